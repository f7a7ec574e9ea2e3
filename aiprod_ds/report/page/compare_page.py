"""The page that compares runs: what differs in their configurations, their curves on shared axes, their
newest measures in one table, and what they show side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aiprod_ds.errors import ConfigError
from aiprod_ds.files import write_atomically
from aiprod_ds.metrics.metric_names import find_measure, find_metric, measure_order
from aiprod_ds.report.curves import Curve, Floats, curves_of, seconds_by_update
from aiprod_ds.report.measures import is_better, label_of, value_text
from aiprod_ds.report.page import facts
from aiprod_ds.report.page.charts import Chart, shared_chart
from aiprod_ds.report.page.gallery import Gallery, Shown, gallery_of
from aiprod_ds.report.page.media_files import MAX_EMBEDDED_BYTES, Embedder, way_to
from aiprod_ds.report.page.record import RunRecord, read_run
from aiprod_ds.report.page.render import render
from aiprod_ds.report.page.status import Status, status_of, time_sentence

PAGE = "comparison.html"
_MAX_RUNS = 8  # as many as there are colours to tell them apart
_MAX_MEASURES, _MAX_TERMS, _MAX_DIFFERENCES, _MAX_EXHIBITS = 16, 8, 200, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run and what is drawn of it; `label` tells it from the others."""

    label: str
    record: RunRecord
    status: Status
    curves: Mapping[str, Curve]

    def over_time(self, updates: Floats) -> Floats:
        """Returns the seconds trained by each of some updates."""
        known, seconds = seconds_by_update(self.curves)
        found: Floats = np.interp(updates, known, seconds)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A run in the key of the page."""

    label: str
    style: str
    folder: str
    link: str
    kind: str
    title: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A value in the table of measures; `state` is best where it is the only best one."""

    text: str
    state: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What all runs show of one clip or prompt; `shown` has one entry for each run that shows it."""

    title: str
    original: Shown | None
    shown: tuple[tuple[str, str, Shown], ...]


def write_comparison(
    folders: Sequence[Path], output: Path, *, is_running: Callable[[Path], bool] = lambda _: False
) -> Path:
    """Writes the page that compares runs, and returns its path.

    Args:
        folders: Two to eight run folders.
        output: The page; its folder is made if it is missing.
        is_running: Whether a process trains in a folder.

    Raises:
        ConfigError: If there are too few or too many runs, or one is named twice.
        DataError: If one is no run folder.
        OSError: If the page cannot be written.
    """
    if not 2 <= len(folders) <= _MAX_RUNS:
        raise ConfigError(f"report: must compare 2 to {_MAX_RUNS} runs, got {len(folders)}. Name fewer.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("report: must compare different runs, got one twice. Name each once.")
    records = [read_run(folder, is_running=is_running(folder)) for folder in folders]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, render_comparison(records, output.parent))
    return output


def render_comparison(
    records: Sequence[RunRecord], folder: Path, *, max_bytes: int = MAX_EMBEDDED_BYTES
) -> str:
    """Returns the page, whose links are relative to the folder that it stands in."""
    runs = [
        _Run(label=label, record=record, status=status_of(record), curves=curves_of(record.rows))
        for label, record in zip(_labels(records), records, strict=True)
    ]
    bases = [way_to(record.folder, folder) for record in records]
    configs = [record.config for record in records]
    differences = [row for row in facts.differences(configs) if row[0] != "output_dir"]
    header = ("key", *(run.label for run in runs))
    measures = _measure_names(runs)
    galleries = [
        gallery_of(
            run.record.evaluations,
            Embedder(folder=run.record.folder, base=base, max_bytes=max_bytes // len(runs)),
        )
        for run, base in zip(runs, bases, strict=True)
    ]
    return render(
        "compare.html.j2",
        entries=[_entry(run, place, bases[place]) for place, run in enumerate(runs)],
        header=header,
        measure_rows=[(label_of(name), _cells(name, runs)) for name in measures],
        differences=facts.Table(
            header=header,
            rows=tuple(differences[:_MAX_DIFFERENCES]),
            note=f"{len(differences) - _MAX_DIFFERENCES:,} more differ."
            if len(differences) > _MAX_DIFFERENCES
            else "",
        ),
        losses=_loss_charts(runs),
        measures=[chart for name in measures for chart in _measure_charts(name, runs)],
        speed=_kept(
            [
                _shared(runs, "throughput/clips_per_second", "clips/s", ""),
                _shared(runs, "learning_rate", "learning rate", ""),
            ]
        ),
        beside=_side_by_side(runs, galleries),
        made=max(record.as_of for record in records).strftime("%Y-%m-%d %H:%M UTC"),
        title=" and ".join(filter(None, [", ".join(header[1:-1]), header[-1]])),
    )


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Returns the names of the folders, as long as they must be to differ."""
    for depth in range(1, 6):
        labels = ["/".join(record.folder.resolve().parts[-depth:]) for record in records]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{record.name} ({place})" for place, record in enumerate(records, start=1)]


def _entry(run: _Run, place: int, base: str) -> Entry:
    record, status = run.record, run.status
    link = f"{base}report.html" if (record.folder / "report.html").is_file() else ""
    done = (
        f"{status.updates:,} updates" if not status.planned else f"{status.updates:,} of {status.planned:,}"
    )
    return Entry(
        label=run.label,
        style=f"run-{place}",
        folder=str(record.folder),
        link=link,
        kind=status.kind,
        title=f"{status.title} {status.percent}" if status.kind != "completed" else status.title,
        words=" · ".join(filter(None, [f"{done}, {time_sentence(status)}", facts.summary_words(record)])),
    )


def _measure_names(runs: Sequence[_Run]) -> list[str]:
    names = {name for run in runs for record in run.record.evaluations for name in record.metrics if name}
    return sorted(names, key=measure_order)[:_MAX_MEASURES]


def _cells(name: str, runs: Sequence[_Run]) -> list[Cell]:
    """Returns the newest value of a measure in every run, the best one marked."""
    values = []
    for run in runs:
        found = [record.metrics[name] for record in run.record.evaluations if name in record.metrics]
        values.append(found[-1] if found else None)
    cells = []
    for value in values:
        others = list(values)
        others.remove(value)
        is_best = value is not None and all(
            other is None or is_better(name, other, value) for other in others
        )
        text = "-" if value is None else value_text(name, value)
        cells.append(Cell(text=text, state="best" if is_best and any(o is not None for o in others) else ""))
    return cells


def _loss_charts(runs: Sequence[_Run]) -> list[Chart]:
    charts = [_shared(runs, "loss/total", "loss", ""), _shared(runs, "loss/total", "loss", "", by_time=True)]
    names = sorted({name for run in runs for name in run.curves if name.startswith("loss/")} - {"loss/total"})
    charts += [_shared(runs, name, label, "") for name, label in _common(names)]
    return _kept(charts)


def _common(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, find_metric(name).label) for name in names[:_MAX_TERMS] if name != "loss/"]


def _shared(runs: Sequence[_Run], name: str, title: str, unit: str, *, by_time: bool = False) -> Chart | None:
    series = []
    for run in runs:
        curve = run.curves.get(name)
        if curve is None:
            empty = np.array([], dtype=np.float64)
            series.append((run.label, empty, empty))
        else:
            xs = run.over_time(curve.updates) if by_time else curve.updates
            series.append((run.label, xs, curve.values))
    return shared_chart(
        series,
        title=title,
        unit=unit,
        x_title="time" if by_time else "update",
        may_be_log=name.startswith("loss/"),
    )


def _measure_charts(name: str, runs: Sequence[_Run]) -> list[Chart]:
    measure = find_measure(name)
    charts = []
    for x_title in ("update", "time"):
        series = []
        for run in runs:
            points = [
                (record.update, record.metrics[name])
                for record in run.record.evaluations
                if name in record.metrics
            ]
            updates = np.array([update for update, _ in points], dtype=np.float64)
            values = np.array([value for _, value in points], dtype=np.float64)
            xs = updates if x_title == "update" or not points else run.over_time(updates)
            series.append((run.label, xs, values))
        charts.append(
            shared_chart(
                series,
                title=measure.label,
                unit="" if measure.unit == "1" else measure.unit,
                x_title=x_title,
                has_dots=True,
            )
        )
    return _kept(charts)


def _side_by_side(runs: Sequence[_Run], galleries: Sequence[Gallery]) -> list[Beside]:
    """Returns the clips and prompts that runs show, by their titles; a clip without one by its number."""
    found: dict[tuple[str, str], Beside] = {}
    for place, (run, gallery) in enumerate(zip(runs, galleries, strict=True)):
        for kind, exhibits in (
            ("preview", gallery.previews),
            ("clip", gallery.clips),
            ("sound", gallery.sounds),
        ):
            for exhibit in exhibits:
                if exhibit.newest is None:
                    continue
                title = exhibit.title or f"Clip {exhibit.number}"
                known = found.get((kind, title), Beside(title=title, original=exhibit.original, shown=()))
                shown = (*known.shown, (run.label, f"run-{place}", exhibit.newest))
                original = known.original or exhibit.original
                found[kind, title] = Beside(title=title, original=original, shown=shown)
    return sorted(found.values(), key=lambda beside: -len(beside.shown))[:_MAX_EXHIBITS]


def _kept(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
