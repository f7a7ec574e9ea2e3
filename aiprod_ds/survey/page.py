"""The survey as one page that loads nothing: what to do first, the contact sheet, how the files are
distributed, and a table that can be searched and sorted.

Owns what is shown of many files, so that the page stays small: the gravest first. Its look is that of the
run's page (`aiprod_ds.report.page`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from aiprod_ds.files import write_atomically
from aiprod_ds.report.page.render import render
from aiprod_ds.report.words import plural
from aiprod_ds.survey.findings import FINDINGS, FindingKind, Level
from aiprod_ds.survey.rows import Row
from aiprod_ds.survey.run import Survey
from aiprod_ds.survey.sheet import Tile
from aiprod_ds.survey.tally import Found, Histogram, listed
from aiprod_ds.survey.words import level_words, printable, rate_words, size_words, time_words, totals

MAX_ROWS = 2_000
_MAX_BARS = 16
Notes = tuple[tuple[str, str, str], ...]
_LEVELS: tuple[Level | None, ...] = (Level.LEFT_OUT, Level.LOOK, Level.TREATED, None)
_STYLES = {Level.LEFT_OUT: "left-out", Level.LOOK: "look", Level.TREATED: "treated", None: "good"}


class PageRows:
    """Keeps the rows that the page shows, as many as it shows of each level."""

    def __init__(self) -> None:
        self._rows: dict[Level | None, list[Row]] = {level: [] for level in _LEVELS}
        self.num_all = 0

    def row(self, row: Row) -> None:
        """See `Writer`."""
        self.num_all += 1
        kept = self._rows[row.level]
        if len(kept) < MAX_ROWS:
            kept.append(row)

    def ignored(self, path: str, reason: str) -> None:
        """See `Writer`; the tally names some."""

    def chosen(self) -> list[Row]:
        """Returns the rows to show, the gravest first."""
        return [row for level in _LEVELS for row in self._rows[level]][:MAX_ROWS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of a whole, in percent; `style` names its class in the style sheet."""

    label: str
    count: int
    percent: float
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A histogram as the template draws it."""

    title: str
    bars: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A finding and its files."""

    key: str
    kind: FindingKind
    found: Found
    style: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell of the table; `order` is what it is sorted by."""

    text: str
    order: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A file in the table.

    Attributes:
        notes: Style, words and effect of each finding.
        kinds: Names of its findings, for the filter.
    """

    path: str
    level: str
    level_words: str
    cells: tuple[Cell, ...]
    notes: Notes
    kinds: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A tile of the contact sheet as the template draws it."""

    title: str
    words: str
    url: str
    width: int
    height: int
    problem: str
    notes: Notes


_HEADER = ("kind", "size", "aspect", "rate", "length", "sound", "color", "caption")


def write_survey_page(survey: Survey, rows: PageRows, folder: Path, *, command: str, table: str) -> Path:
    """Writes `report.html` into `folder` and returns its path.

    Args:
        survey: What is told as a whole.
        rows: Those of the table.
        folder: Exists.
        command: What to do next.
        table: Name of the CSV beside the page.
    """
    tally = survey.tally
    shown = rows.chosen()
    path = folder / "report.html"
    text = render(
        "survey.html.j2",
        package="aiprod_ds.survey",
        name="survey",
        title=printable(survey.source.resolve().name or str(survey.source)),
        source=printable(str(survey.source)),
        configuration=survey.demands.configuration,
        totals=totals(tally),
        verdict=_verdict(survey),
        verdict_style="worse" if tally.num_used == 0 else ("mixed" if _num_grave(survey) else "better"),
        shares=tuple(_shares(survey)),
        problems=tuple(_problems(survey)),
        tiles=tuple(_picture(tile) for tile in survey.tiles),
        histograms=tuple(_bars(histogram) for histogram in tally.histograms()),
        shapes=tuple(_shapes(survey)),
        is_common=survey.demands.configuration is None,
        header=_HEADER,
        phases=tuple(tally.buckets),
        rows=tuple(_table_row(row, tuple(tally.buckets)) for row in shown),
        num_all=rows.num_all,
        table=table,
        ignored=tuple(
            (reason, found.count, tuple(map(printable, listed(found))))
            for reason, found in sorted(tally.ignored.items(), key=lambda item: -item[1].count)
        ),
        command=command,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(path, text)
    return path


def _verdict(survey: Survey) -> str:
    tally = survey.tally
    if tally.num_used == 0:
        return "Nothing here can be trained on."
    left_out, look = tally.num_at(Level.LEFT_OUT), tally.num_at(Level.LOOK)
    words = []
    if left_out:
        words.append(f"{left_out:,} {plural('file', left_out)} cannot be used")
    if look:
        words.append(f"{look:,} should be looked at")
    if not words:
        return "Everything here can be trained on."
    number = tally.num_used
    return f"{' and '.join(words)}; {number:,} of {tally.num_files:,} can be trained on."


def _num_grave(survey: Survey) -> int:
    return survey.tally.num_at(Level.LEFT_OUT) + survey.tally.num_at(Level.LOOK)


def _shares(survey: Survey) -> Iterator[Share]:
    tally = survey.tally
    for level in reversed(_LEVELS):
        count = tally.levels["good"] if level is None else tally.num_at(level)
        if count:
            percent = 100 * count / tally.num_files
            yield Share(label=level_words(level), count=count, percent=percent, style=_STYLES[level])


def _problems(survey: Survey) -> Iterator[Problem]:
    for key, found in survey.tally.problems():
        kind = FINDINGS[key]
        names = tuple(map(printable, listed(found)))
        yield Problem(key=key, kind=kind, found=found, style=_STYLES[kind.level], names=names)


def _bars(histogram: Histogram) -> Bars:
    bars = histogram.bars()
    if len(bars) > _MAX_BARS:
        kept = {label for label, _ in sorted(bars, key=lambda bar: -bar[1])[: _MAX_BARS - 1]}
        rest = sum(count for label, count in bars if label not in kept)
        bars = [bar for bar in bars if bar[0] in kept] + [("the others", rest)]
    return Bars(title=histogram.title, bars=tuple(_scaled(bars)))


def _scaled(bars: Sequence[tuple[str, int]]) -> Iterator[Share]:
    most = max((count for _, count in bars), default=1)
    for label, count in bars:
        yield Share(label=label, count=count, percent=100 * count / most)


def _shapes(survey: Survey) -> Iterator[Bars]:
    for phase, counts in survey.tally.buckets.items():
        bars = sorted(counts.items(), key=lambda item: -item[1])
        yield _bars_of(phase, bars)


def _bars_of(title: str, bars: Sequence[tuple[str, int]]) -> Bars:
    return Bars(title=title, bars=tuple(_scaled(bars[:_MAX_BARS])))


def _notes(row: Row) -> Notes:
    return tuple(
        (_STYLES[found.level], printable(found.text), FINDINGS[found.kind].effect) for found in row.findings
    )


def _table_row(row: Row, phases: tuple[str, ...]) -> TableRow:
    color = " ".join(filter(None, (row.hdr.upper(), row.color_matrix, row.color_range)))
    sound = f"{row.audio_rate_hz / 1000:g} kHz {row.audio_layout}" if row.audio_rate_hz else ""
    cells = (
        Cell(text=row.kind, order=row.kind),
        Cell(text=size_words(row), order=f"{row.width * row.height}"),
        Cell(text=row.aspect, order=f"{row.width / row.height if row.height else 0:.4f}"),
        Cell(text=rate_words(row), order=f"{row.rate_hz}"),
        Cell(text=time_words(row), order=f"{row.seconds}"),
        Cell(text=sound, order=f"{row.audio_rate_hz}"),
        Cell(text=color, order=color),
        Cell(text=printable(row.caption), order=printable(row.caption)),
        *(Cell(text=row.buckets.get(phase, ""), order=row.buckets.get(phase, "")) for phase in phases),
    )
    return TableRow(
        path=printable(row.path),
        level=_STYLES[row.level],
        level_words=level_words(row.level),
        cells=cells,
        notes=_notes(row),
        kinds=" ".join(found.kind for found in row.findings),
    )


def _picture(tile: Tile) -> Picture:
    row = tile.row
    url = f"data:image/jpeg;base64,{base64.b64encode(tile.jpeg).decode('ascii')}" if tile.jpeg else ""
    words = " · ".join(filter(None, (size_words(row), time_words(row), rate_words(row))))
    return Picture(
        title=printable(row.path),
        words=words,
        url=url,
        width=tile.width,
        height=tile.height,
        problem=printable(tile.problem),
        notes=_notes(row),
    )
