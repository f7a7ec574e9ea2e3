"""report.html of one run: from what stands in its folder to the page in it.

Needs nothing but the folder, so that the page can be made while the run goes on, when it has ended, and after
it was killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aiprod_ds.files import write_atomically
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.metric_names import METRICS, find_measure, find_metric, measure_order
from aiprod_ds.report.curves import Curve, Span, curves_of, spans_of
from aiprod_ds.report.page import facts
from aiprod_ds.report.page.charts import (
    Band,
    Chart,
    Lane,
    curve_chart,
    lane,
    points_chart,
    with_lanes,
)
from aiprod_ds.report.page.gallery import gallery_of
from aiprod_ds.report.page.media_files import MAX_EMBEDDED_BYTES, Embedder, way_to
from aiprod_ds.report.page.record import RunRecord, read_run
from aiprod_ds.report.page.render import render
from aiprod_ds.report.page.status import Status, phases_of, status_of, time_sentence
from aiprod_ds.strict_yaml import write_yaml

PAGE = "report.html"
_MAX_MEASURES = 24
_FROM_ZERO = ("throughput/", "time/", "memory/", "learning_rate")
_MAY_BE_LOG = ("loss/", "gradient/")


def write_page(
    folder: Path,
    *,
    output: Path | None = None,
    is_running: bool = False,
    max_bytes: int = MAX_EMBEDDED_BYTES,
) -> Path:
    """Writes the page of a run from what stands in its folder, and returns its path.

    Never looks at the folder's lock: a process that holds it would lose it by opening the file.

    Args:
        folder: Of the run.
        output: The page; `report.html` in the folder by default.
        is_running: Whether a process still trains in it; without report.json it counts as killed if not.
        max_bytes: Of films, sounds and pictures inside the page; what goes beyond is linked.

    Raises:
        DataError: If it is no run folder.
        OSError: If the page cannot be written.
    """
    path = folder / PAGE if output is None else output
    run = read_run(folder, is_running=is_running)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_run(run, base=way_to(folder, path.parent), max_bytes=max_bytes))
    return path


def render_run(run: RunRecord, *, base: str = "", max_bytes: int = MAX_EMBEDDED_BYTES) -> str:
    """Returns the page of a run; `base` is the way from the page to the run folder, as `way_to` gives it."""
    curves, spans = curves_of(run.rows), spans_of(run.rows)
    names = {index: str(rows[0].get("name", index)) for index, rows in phases_of(run.plan).items()}
    status = status_of(run)
    _, verdict = facts.changes_and_verdict(run)
    before, now = facts.before_and_now(run)
    return render(
        "run.html.j2",
        run=run,
        status=status,
        time=time_sentence(status),
        plan_bands=_plan_bands(run, status),
        summary=facts.summary_words(run),
        verdict=verdict,
        cards=facts.cards(run),
        num_cards=facts.num_cards(run),
        first_only=before is not None and now is None,
        none_judged=facts.is_none_judged(run),
        now=now,
        gallery=gallery_of(run.evaluations, Embedder(folder=run.folder, base=base, max_bytes=max_bytes)),
        loss=_loss_chart(curves, spans, names, run),
        losses=_charts(curves, spans, ("loss/",), without=("loss/total",)),
        measures=_measure_charts(run.evaluations, spans, run.updates),
        training=_charts(curves, spans, ("learning_rate", "gradient/", "latent/")),
        speed=_charts(curves, spans, ("throughput/", "time/update", "time/data", "memory/")),
        evaluations=facts.evaluation_table(run),
        phases=facts.phase_table(run, spans),
        times=facts.time_table(run),
        time_title=facts.time_title(run),
        notes=facts.notes(run),
        configuration=write_yaml(run.config) if run.config else "",
        changes=facts.configuration_changes(run),
        environment=facts.environment_facts(run),
        starts=facts.starts(run),
    )


def _loss_chart(
    curves: Mapping[str, Curve], spans: Sequence[Span], names: Mapping[int, str], run: RunRecord
) -> Chart | None:
    """Returns the loss with what changed from phase to phase over it."""
    curve = curves.get("loss/total")
    if curve is None:
        return None
    chart = curve_chart(curve, title="loss", unit="", spans=spans, names=names, may_be_log=True)
    return None if chart is None else with_lanes(chart, _lanes(spans, run, chart))


def _lanes(spans: Sequence[Span], run: RunRecord, chart: Chart) -> list[Lane]:
    phases = phases_of(run.plan)
    rows = [phases[span.index][0] for span in spans if span.index in phases]
    if len(rows) != len(spans) or not rows:
        return []
    shapes = [facts.shape_text(row) for row in rows]
    areas = [_whole(row.get("height")) * _whole(row.get("width")) for row in rows]
    frames = [_whole(row.get("frames")) for row in rows]
    batches = [_whole(row.get("global_batch_size")) for row in rows]
    found = []
    if any(shapes):
        found.append(lane("resolution", spans, areas, shapes, chart.x))
    title = "frames" if any(shapes) else "samples"
    found.append(lane(title, spans, frames, [f"{value:,}" for value in frames], chart.x))
    found.append(lane("batch", spans, batches, [f"{value:,}" for value in batches], chart.x))
    return [drawn for drawn in found if drawn is not None]


def _charts(
    curves: Mapping[str, Curve], spans: Sequence[Span], prefixes: Sequence[str], without: Sequence[str] = ()
) -> list[Chart]:
    """Returns a chart of every metric with one of the prefixes, in the order of prefixes and of the table of
    metrics."""
    order = {metric.name: place for place, metric in enumerate(METRICS)}
    charts = []
    for prefix in prefixes:
        for name in sorted(curves, key=lambda name: (order.get(name, len(order)), name)):
            if not name.startswith(prefix) or name in without or _says_nothing(curves[name]):
                continue
            metric = _metric_words(name)
            unit, curve = metric[1], curves[name]
            if unit == "B":
                unit = "GiB"
                curve = Curve(name=name, updates=curve.updates, values=curve.values / 2**30)
            chart = curve_chart(
                curve,
                title=metric[0],
                unit="" if unit == "1" or unit in metric[0].split() else unit,
                spans=spans,
                is_smoothed=name != "learning_rate",
                from_zero=name.startswith(_FROM_ZERO),
                may_be_log=name.startswith(_MAY_BE_LOG),
            )
            if chart is not None:
                charts.append(chart)
    return charts


def _says_nothing(curve: Curve) -> bool:
    return curve.name == "gradient/loss_scale" and bool((curve.values == 1).all())


def _metric_words(name: str) -> tuple[str, str]:
    try:
        metric = find_metric(name)
    except ValueError:  # of another version
        return name.rpartition("/")[2].replace("_", " "), "1"
    return metric.label, metric.unit


def _measure_charts(records: Sequence[EvaluationRecord], spans: Sequence[Span], updates: int) -> list[Chart]:
    """Returns the charts of held-out measures over all evaluations."""
    charts = []
    names = sorted({name for record in records for name in record.metrics}, key=measure_order)
    for name in names[:_MAX_MEASURES]:
        points = [(record.update, record.metrics[name]) for record in records if name in record.metrics]
        measure = find_measure(name)
        chart = points_chart(
            Curve(
                name=name,
                updates=np.array([update for update, _ in points], dtype=np.float64),
                values=np.array([value for _, value in points], dtype=np.float64),
            ),
            title=measure.label,
            unit="" if measure.unit == "1" else measure.unit,
            digits=measure.digits,
            x_end=updates,
            spans=spans,
        )
        if chart is not None:
            charts.append(chart)
    return charts


def _plan_bands(run: RunRecord, status: Status) -> list[Band]:
    """Returns the phases of the plan as parts of the progress bar, in percent."""
    phases = phases_of(run.plan)
    if not status.planned or len(phases) > 60:
        return []
    bands, left = [], 0.0
    for rows in phases.values():
        length = _whole(rows[0].get("updates") or rows[0].get("max_updates"))
        width = round(100 * length / status.planned, 2)
        bands.append(Band(left=round(left, 2), width=width, name=str(rows[0].get("name", ""))))
        left += width
    return bands


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
