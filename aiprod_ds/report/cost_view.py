"""What a run needs and costs on a kind of GPU, on one page of a terminal: memory by what it is for, time,
hours, money.

Says nothing that the estimate's document does not; this is only how it looks. Prints nothing: the command
line does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from aiprod_ds.report.plan_view import in_units

Row = Mapping[str, Any]

PARTS = {
    "weights": "blue",
    "gradients": "magenta",
    "optimizer": "green",
    "average": "white",
    "activations": "yellow",
    "buffers": "cyan",
}
"""What memory is for, and its colour here and in the plot."""
_BAR_WIDTH = 50
_LETTERS = {
    "weights": "W",
    "gradients": "G",
    "optimizer": "O",
    "average": "E",
    "activations": "A",
    "buffers": "B",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CostView:
    """A rich renderable.

    Attributes:
        document: What `aiprod_ds.train.planning.estimate.Estimate.document` returns.
        memory_bytes: What one card has for torch; the width of the bars.
    """

    document: Row
    memory_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the parts from top to bottom; rich calls it with the console's width and encoding."""
        found = self.document
        yield Text(f"on {found['gpus']} x {found['machine']}, estimated", style="bold")
        for title, rows in (("as configured", found["configured"]), ("fastest that fits", found["chosen"])):
            if rows:
                yield Text()
                yield Text(title, style="bold")
                yield self._table(rows)
                yield from (self._bar(row) for row in rows)
                yield self._in_all(rows)
        yield Text()
        yield Text("how it computes", style="bold")
        yield from (Text(line) for line in found["computes"])
        if found["advice"]:
            yield Text()
            yield Text("to be had", style="bold")
            yield from (Text(line) for line in found["advice"])
        if found["problem"] is not None:
            yield Text()
            yield Text(found["problem"], style="red")
        yield Text()
        yield Text(_ASSUMPTIONS, style="dim")

    def _table(self, rows: Sequence[Row]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
        table.add_column("", style="dim", no_wrap=True)
        for row in rows:
            bucket = (
                f" bucket {row['bucket']}"
                if sum(other["phase"] == row["phase"] for other in rows) > 1
                else ""
            )
            table.add_column(f"{row['phase']} {row['name']}{bucket}")
        for label, text in self._lines():
            table.add_row(label, *(text(row) for row in rows))
        return table

    def _lines(self) -> list[tuple[str, Callable[[Row], str]]]:
        memory = [(part, lambda row, part=part: f"{row['memory'][part] / 1e9:.2f} GB") for part in PARTS]
        return [
            ("trained", lambda row: f"{in_units(row['trained'])} of {in_units(row['parameters'])}"),
            ("FLOPs/update", lambda row: in_units(row["flops_per_update"])),
            ("ZeRO stage", lambda row: f"{row['zero_stage']}{', offloaded' if row['is_offloaded'] else ''}"),
            ("recomputation", lambda row: _recomputation(row["recompute"])),
            ("passes", lambda row: "captured" if row["is_captured"] else "kernel by kernel"),
            ("micro-batch", lambda row: f"{row['micro_batch_size']} x {row['accumulation']}"),
            *memory,
            ("at the", lambda row: row["memory"]["moment"]),
            (
                "card needs",
                lambda row: f"{row['memory']['needed'] / 1e9:.1f} of {self.memory_bytes / 1e9:.1f} GB",
            ),
            ("host needs", lambda row: f"{row['memory']['host'] / 1e9:.1f} GB"),
            ("fits", lambda row: "yes" if row["fits"] else "NO"),
            ("updates/s", lambda row: f"{1 / row['seconds_per_update']:.3g}"),
            ("updates", lambda row: f"{'' if row['is_bounded'] else 'at least '}{row['updates']:,.0f}"),
            ("GPU-hours", lambda row: f"{row['gpu_hours']:,.1f}"),
            ("cost", lambda row: f"${row['dollars']:,.0f}"),
        ]

    def _bar(self, row: Row) -> Text:
        """Draws the card's memory: a letter for each part, the rest that is needed as `+`, what is free as
        dots."""
        text = Text(f"{row['name'][:12]:<12} ", style="dim")
        cells = 0
        for part, colour in PARTS.items():
            count = round(_BAR_WIDTH * row["memory"][part] / self.memory_bytes)
            text.append(_LETTERS[part] * count, style=colour)
            cells += count
        text.append("." * max(_BAR_WIDTH - cells, 0), style="dim")
        share = row["memory"]["needed"] / self.memory_bytes
        return text.append(f" {100 * share:.0f} %", style="" if row["fits"] else "red")

    def _in_all(self, rows: Sequence[Row]) -> Text:
        hours, dollars = (sum(row[key] for row in rows) for key in ("gpu_hours", "dollars"))
        days = hours / self.document["gpus"] / 24
        price = self.document["dollars_per_gpu_hour"]
        return Text.assemble(
            ("in all  ", "bold"),
            f"{hours:,.1f} GPU-hours, {days:,.1f} days, ${dollars:,.0f} at ${price:g} per GPU-hour",
        )


def _recomputation(recompute: int) -> str:
    return f"1 of {recompute} blocks" if recompute > 1 else "on" if recompute else "off"


_ASSUMPTIONS = (
    "W weights, G gradients, O optimizer, E average, A activations, B buffers. Without evaluation, saving "
    "and starting; "
    "all but memory and one GPU's speed is assumed from data sheets: docs/guide.md, What will it cost?"
)
