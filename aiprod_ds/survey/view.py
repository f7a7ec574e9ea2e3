"""The survey in a terminal: how much there is, what is wrong and what happens with it, and what to do next.

Owns how it looks there; the page shows more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from aiprod_ds.report.words import plural
from aiprod_ds.survey.findings import FINDINGS, Level
from aiprod_ds.survey.run import Survey
from aiprod_ds.survey.tally import Found
from aiprod_ds.survey.words import printable, totals

_STYLES = {Level.LEFT_OUT: "bold red", Level.LOOK: "yellow", Level.TREATED: "dim"}
_NAMED, _MAX_SHAPES = 2, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyView:
    """What the command prints.

    Attributes:
        page: Where the page is; None if none was written.
        table: Where the CSV is; None likewise.
        command: What to do next.
    """

    survey: Survey
    page: Path | None
    table: Path | None
    command: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the summary."""
        tally = self.survey.tally
        yield _line(f"{printable(str(self.survey.source))}: {totals(tally)}")
        left_out, look = tally.num_at(Level.LEFT_OUT), tally.num_at(Level.LOOK)
        words = (
            f"{tally.num_used:,} of {tally.num_files:,} {plural('file', tally.num_files)} can be trained on"
        )
        if left_out:
            words += f", {left_out:,} cannot"
        if look:
            words += f", {look:,} should be looked at"
        yield _line(words)
        if tally.found:
            yield Text()
            yield self._problems()
        if tally.ignored:
            reasons = sorted(tally.ignored.items(), key=lambda item: -item[1].count)
            yield _line("ignored: " + ", ".join(f"{reason} ({found.count:,})" for reason, found in reasons))
        for phase, counts in tally.buckets.items():
            most = counts.most_common(_MAX_SHAPES)
            more = f"; {len(counts) - len(most)} more shapes" if len(counts) > len(most) else ""
            words = "; ".join(f"{count:,} in {shape}" for shape, count in most)
            yield _line(f"{phase}: {words}{more}")
        yield Text()
        if self.page is not None:
            yield _line(f"page:  {self.page}")
            yield _line(f"table: {self.table}")
        if self.command:
            yield _line(f"next:  {self.command}")

    def _problems(self) -> Table:
        table = Table("files", "what", "becomes", "such as", box=None, pad_edge=False, header_style="dim")
        table.columns[0].justify = "right"
        for key, found in self.survey.tally.problems():
            kind = FINDINGS[key]
            table.add_row(
                Text(f"{found.count:,}", style=_STYLES[kind.level]),
                kind.title,
                kind.effect,
                Text(_some(found), style="dim", overflow="fold"),
            )
        return table


def _some(found: Found) -> str:
    more = f" and {found.count - _NAMED:,} more" if found.count > _NAMED else ""
    return printable(", ".join(found.names[:_NAMED])) + more


def _line(text: str) -> Text:
    return Text(text, overflow="fold")
