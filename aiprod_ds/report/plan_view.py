"""The whole curriculum on one page of a terminal: phases side by side, the learning rate as a plot, the
totals.

Says nothing that `aiprod_ds.curriculum.describe` does not; this is only how it looks. Prints nothing: the
command line does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from aiprod_ds.curriculum.describe import CurvePoint
from aiprod_ds.report.curve_plot import CurvePlot, Piece

_LABEL_WIDTH, _COLUMN_WIDTH = 14, 21  # three phases stand side by side in 80 characters, six in 160

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """A rich renderable.

    Attributes:
        source: As messages name the configuration, usually its file.
        parameters: Elements of the whole model, frozen ones among them.
        rows: From `curriculum.describe.describe`, with the configuration.
        totals: From `totals` there.
        curve: From `learning_rate_curve` there.
        data_problem: Why the data was not read; None if it was.
        evaluation: What evaluations cost, from `aiprod_ds.planner.evaluations`, with `text` and `warning`.
        found: What `buckets: auto` found, one sentence a bucket.
    """

    source: str
    model: str
    parameters: int
    world_size: int
    rows: Sequence[Row]
    totals: Row
    curve: Sequence[CurvePoint]
    data_problem: str | None = None
    evaluation: Row | None = None
    found: Sequence[str] = ()

    def document(self) -> dict[str, Any]:
        """Returns the page JSON-ready: `phases` are the rows (one for each bucket of each phase),
        `learning_rate_curve` is a list of points with `update`, `phase` and `learning_rate`; the other keys
        are the attributes of this class."""
        return {
            "source": self.source,
            "model": self.model,
            "parameters": self.parameters,
            "world_size": self.world_size,
            "data_problem": self.data_problem,
            "phases": [dict(row) for row in self.rows],
            "totals": dict(self.totals),
            "learning_rate_curve": [point._asdict() for point in self.curve],
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
            "found": list(self.found),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the parts from top to bottom; rich calls it with the console's width and encoding."""
        yield Text(self.source, style="bold")
        yield Text(
            f"{self.model}, {in_units(self.parameters)} parameters, {_numbered(self.world_size, 'rank')}"
        )
        yield Text()
        for rows in _side_by_side(self.rows, options.max_width):
            yield self._table(rows)
            yield Text()
        yield Text(
            "learning rate over updates"
            + (", open phases at their longest" if self.totals["updates"] is None else ""),
            style="dim",
        )
        yield CurvePlot(pieces=self._pieces())
        yield Text()
        yield Text(
            "batch = micro-batch x accumulation x ranks; updates count from 0; amounts are over all ranks",
            style="dim",
        )
        if self.data_problem is not None:
            yield Text(f"data not read, so no epochs: {self.data_problem}", style="yellow")
        for sentence in self.found:
            yield Text(sentence)
        yield Text.assemble(("in all  ", "bold"), self._in_all())
        if self.evaluation is not None:
            yield Text.assemble(("beside  ", "bold"), self.evaluation["text"])
            if self.evaluation["warning"] is not None:
                yield Text(self.evaluation["warning"], style="yellow")

    def _table(self, rows: Sequence[Row]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
        table.add_column("", style="dim", no_wrap=True, min_width=_LABEL_WIDTH)
        for row in rows:
            table.add_column(self._heading(row), overflow="fold", max_width=_COLUMN_WIDTH * 2)
        for label, text in self._lines():
            cells = [text(row) for row in rows]
            if any(cells):
                table.add_row(label, *(Text(cell or "-") for cell in cells))
        return table

    def _heading(self, row: Row) -> Text:
        siblings = sum(other["phase"] == row["phase"] for other in self.rows)
        bucket = f" bucket {row['bucket']}" if siblings > 1 else ""
        return Text(f"{row['phase']} {row['name']}{bucket}")

    def _lines(self) -> list[tuple[str, Callable[[Row], str]]]:
        """Label and text of each line; one that is empty for all phases is left out."""
        is_sound = all(map(_is_sound, self.rows))
        return [
            ("ends", _ends),
            ("first update", lambda row: _bounded(row, "first_update", _count)),
            ("last update", lambda row: _bounded(row, "last_update", _count)),
            ("updates", lambda row: _bounded(row, "updates", _count)),
            ("size", lambda row: "" if _is_sound(row) else f"{row['height']}x{row['width']}"),
            ("samples" if is_sound else "frames", _frames),
            (
                f"{'sample' if is_sound else 'frame'} rate",
                lambda row: (
                    "as the clip's" if row["frame_rate_hz"] is None else f"{row['frame_rate_hz']:g} Hz"
                ),
            ),
            ("share", self._share),
            ("batch", lambda row: f"{_triple(row)} x {self.world_size}"),
            ("clips", lambda row: _bounded(row, "samples", _count)),
            (
                "epochs",
                lambda row: (
                    ""
                    if row["clips"] is None
                    else f"{_bounded(row, 'epochs', _few)} of {_numbered(row['clips'], 'clip')}"
                ),
            ),
            (f"{self._unit}/update", lambda row: in_units(row["pixels_per_update"])),
            (
                "tokens/update",
                lambda row: "" if (n := row["latent_tokens_per_update"]) is None else in_units(n),
            ),
            ("peak rate", lambda row: f"{row['learning_rate_max']:g}"),
            ("schedule", _schedule),
            ("warm-up", lambda row: _numbered(n, "update") if (n := row["warmup_updates"]) else "none"),
            ("sets", _overrides),
        ]

    def _share(self, row: Row) -> str:
        if all(other["share"] == 1.0 for other in self.rows):
            return ""
        return "as clips fit" if row["share"] is None else f"{100 * row['share']:.3g} % of updates"

    def _pieces(self) -> list[Piece]:
        names = {row["phase"]: row["name"] for row in self.rows}
        pieces: list[Piece] = []
        for phase, name in names.items():
            points = [(point.update, point.learning_rate) for point in self.curve if point.phase == phase]
            pieces.append(Piece(name=name, first=points[0][0], end=points[-1][0] + 1, points=points))
        return pieces

    def _in_all(self) -> str:
        updates, samples, pixels = (
            _bounded(self.totals, name, show)
            for name, show in (("updates", _count), ("samples", _count), ("pixels", in_units))
        )
        return f"{updates} updates; {samples} clips; {pixels} {self._unit}"

    @property
    def _unit(self) -> str:
        return "samples" if all(map(_is_sound, self.rows)) else "pixels"


def in_units(number: float) -> str:
    """Returns three significant digits with a decimal prefix: 999 -> `999`, 147456 -> `147 k`, 1.5e9 ->
    `1.50 G`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {prefix}"
    return f"{number:g}"


def _side_by_side(rows: Sequence[Row], width: int) -> list[Sequence[Row]]:
    """Splits the rows into tables of about equal width that fit, in order."""
    most = max((width - _LABEL_WIDTH) // _COLUMN_WIDTH, 1)
    tables = -(-len(rows) // most)
    each = -(-len(rows) // tables)
    return [rows[start : start + each] for start in range(0, len(rows), each)]


def _bounded(row: Row, name: str, show: Callable[[Any], str]) -> str:
    exact, low, high = row[name], row[f"min_{name}"], row[f"max_{name}"]
    if exact is not None:
        return show(exact)
    if low is None:
        return "as the data decides"
    return f"{show(low)} or more" if high is None else f"between {show(low)} and {show(high)}"


def _is_sound(row: Row) -> bool:
    return bool(row["height"] == row["width"] == 1)


def _ends(row: Row) -> str:
    end, rules = row["end"], []
    if end["epochs"] is not None:
        rules.append(f"after {_numbered(end['epochs'], 'epoch')}")
    if (plateau := end["plateau"]) is not None:
        rules.append(
            f"when the loss gains under {plateau['threshold']:.3g} in {_count(plateau['patience_updates'])} "
            "updates"
        )
    if not rules:
        return f"after {_numbered(end['limit_updates'], 'update')}"
    if end["minimum_updates"] > 1:
        rules.append(f"not before {_count(end['minimum_updates'])}")
    if end["limit_updates"] is not None:
        rules.append(f"at most {_count(end['limit_updates'])}")
    return ", ".join(rules)


def _frames(row: Row) -> str:
    asked, used = row["requested_frames"], row["frames"]
    length = f"{used:,}" if asked == used else f"{asked:,} -> {used:,}"
    return f"{length} ({used / row['frame_rate_hz']:.2f} s)" if _is_sound(row) else length


def _triple(row: Row) -> str:
    return f"{row['global_batch_size']} = {row['micro_batch_size']} x {row['accumulation']}"


def _schedule(row: Row) -> str:
    return (
        row["schedule"]
        if row["schedule"] == "constant"
        else f"{row['schedule']} to {row['learning_rate_final']:g}"
    )


def _overrides(row: Row) -> str:
    return "\n".join(
        f"{name.rpartition('.')[2].replace('_', ' ')} {_setting(value)}"
        for name, value in row["overrides"].items()
    )


def _setting(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


def _count(number: int) -> str:
    return f"{number:,}"


def _few(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _numbered(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
