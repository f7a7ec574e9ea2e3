"""What `aiprod-ds inspect` shows: facts, a table of checkpoints or of tensors, and whether everything is
whole.

Owns the records and how they look, in a terminal and as JSON. Reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_SHOWN_TENSORS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One tensor: name, type, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """One checkpoint of a run.

    Attributes:
        clock: Counts by name, as in `Clock`; empty if it is not whole.
        layout: `RunState.layout`; empty if it is not whole.
        num_bytes: On disk; 0 if it is not whole.
        problem: Why it is not whole; None if it is.
    """

    name: str
    clock: Mapping[str, int] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a command makes of it.

    Attributes:
        how: In words; or why it does not read it.
    """

    is_read: bool
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that is said of one file or folder.

    Attributes:
        kind: In words, for the first line.
        facts: Lines of the page by name, in their order.
        checkpoints: Newest first; empty for anything but a run.
        tensors: Empty where nothing was opened.
        verified: What was compared and found good, in words; None if nothing was.
        problem: What is wrong with it, in words; None if nothing is.
        uses: What `convert` and `train` make of it.
        all_tensors: Whether the terminal shows all of them; the JSON document always does.
    """

    kind: str
    path: str
    facts: Mapping[str, Any]
    checkpoints: tuple[CheckpointRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    verified: str | None = None
    problem: str | None = None
    uses: Mapping[str, Use] = field(default_factory=dict)
    all_tensors: bool = False

    def document(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping with every tensor."""
        return {
            **{name: value for name, value in asdict(self).items() if name != "all_tensors"},
            "facts": dict(self.facts),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the page."""
        yield _line(f"{self.path}: {self.kind}")
        for name, value in self.facts.items():
            yield _line(f"  {name}: {value}")
        if self.checkpoints:
            yield self._checkpoint_table()
        if self.tensors:
            yield self._tensor_table()
            yield _line(self._sums())
        if self.verified:
            yield _line(f"verified: {self.verified}")
        if self.problem:
            yield _line(f"problem: {self.problem}")
        for command, use in self.uses.items():
            yield _line(f"{command}: {'reads it' if use.is_read else 'does not read it'}: {use.how}")

    def _checkpoint_table(self) -> Table:
        table = Table("checkpoint", "whole", "updates", "phase", "engine", "bytes", box=None)
        for row in self.checkpoints:
            if row.problem:
                table.add_row(Text(row.name), "no", Text(row.problem, overflow="fold"), "", "", "")
                continue
            layout = (
                f"{row.layout['engine']} ZeRO-{row.layout['zero_stage']} {row.layout['precision']} "
                f"x{row.layout['world_size']}"
            )
            table.add_row(
                row.name,
                "yes",
                str(row.clock["updates"]),
                str(row.clock["phase"]),
                layout,
                f"{row.num_bytes:,}",
            )
        return table

    def _tensor_table(self) -> Table:
        shown = self.tensors if self.all_tensors else self.tensors[:_SHOWN_TENSORS]
        table = Table("tensor", "type", "shape", "bytes", box=None)
        for row in shown:
            table.add_row(
                Text(row.name, overflow="fold"), row.dtype, Text(str(list(row.shape))), f"{row.num_bytes:,}"
            )
        if len(shown) < len(self.tensors):
            table.add_row(f"... {len(self.tensors) - len(shown)} more (--all)", "", "", "")
        return table

    def _sums(self) -> str:
        sums: dict[str, tuple[int, int]] = {}
        for row in self.tensors:
            count, num_bytes = sums.get(row.dtype, (0, 0))
            sums[row.dtype] = (count + 1, num_bytes + row.num_bytes)
        each = ", ".join(
            f"{count} {dtype} with {num_bytes:,} bytes" for dtype, (count, num_bytes) in sorted(sums.items())
        )
        return f"{len(self.tensors)} tensors: {each}"


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ignore")  # paths and messages can be copied in one piece
