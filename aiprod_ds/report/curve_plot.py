"""A curve in the terminal: braille dots in a frame, or ASCII where standard output takes nothing else.

Draws pieces side by side, each with its name under it and a border to the next; knows nothing about what they
mean. Called by `aiprod_ds.report.plan_view`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_MAX_WIDTH = 120
_BRAILLE_BITS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # [column][row] of the eight dots of U+2800


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the curve: `points` are (x, y) in order, y >= 0, and a line joins them; it covers x from
    `first` to `end`."""

    name: str
    first: int
    end: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """Characters of a plot and how many dots one of them holds, across and down."""

    across: int
    down: int
    tick: str
    side: str
    corner: str
    floor: str
    foot: str
    border: str


_UNICODE = _Style(across=2, down=4, tick="┤", side="│", corner="┼", floor="─", foot="┴", border="┊")
_ASCII = _Style(across=1, down=1, tick="+", side="|", corner="+", floor="-", foot="+", border=":")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePlot:
    """A rich renderable as wide as the terminal, at most 120 columns.

    Attributes:
        pieces: From left to right, each beginning where the one before ends.
        rows: Height of the drawing without its labels.
    """

    pieces: Sequence[Piece]
    rows: int = 8

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the plot; rich calls it with the console's width and encoding."""
        for line in self.lines(min(options.max_width, _MAX_WIDTH), ascii_only=options.ascii_only):
            yield Text(line, no_wrap=True, overflow="crop")

    def lines(self, width: int, *, ascii_only: bool) -> list[str]:
        """Returns the plot as lines of at most `width` characters, without trailing blanks."""
        style = _ASCII if ascii_only else _UNICODE
        top = max((y for piece in self.pieces for _, y in piece.points), default=0.0) or 1.0
        labels = {0: f"{top:.3g}", self.rows // 2: f"{top * (1 - (self.rows // 2) / self.rows):.3g}"}
        margin = max(len(label) for label in labels.values()) + 1
        columns = max(width - margin - 1, 8)
        drawing = self._drawing(columns, top, style)
        lines = [
            f"{labels.get(row, ''):>{margin - 1}} {style.tick if row in labels else style.side}{drawing[row]}"
            for row in range(self.rows)
        ]
        floor = list(style.floor * columns)
        for column in self._borders(columns):
            floor[column] = style.foot
        lines.append(f"{'0':>{margin - 1}} {style.corner}{''.join(floor)}")
        lines += [" " * (margin + 1) + text for text in (self._numbers(columns), self._names(columns))]
        return [line.rstrip() for line in lines]

    def _drawing(self, columns: int, top: float, style: _Style) -> list[str]:
        dots = self._dots(columns * style.across, self.rows * style.down, top)
        borders = set(self._borders(columns))
        return [
            "".join(
                self._cell(dots, column, row, style, empty=style.border if column in borders else " ")
                for column in range(columns)
            )
            for row in range(self.rows)
        ]

    def _dots(self, width: int, height: int, top: float) -> set[tuple[int, int]]:
        """Places of all dots as (column, row), row 0 on top: straight lines between neighbouring points of a
        piece."""
        dots: set[tuple[int, int]] = set()
        for piece in self.pieces:
            places = [(self._column(x, width), round((1 - y / top) * (height - 1))) for x, y in piece.points]
            dots.update(places)
            for (x0, y0), (x1, y1) in pairwise(places):
                steps = max(abs(x1 - x0), abs(y1 - y0))
                dots.update(
                    (x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps))
                    for i in range(1, steps)
                )
        return dots

    @staticmethod
    def _cell(dots: set[tuple[int, int]], column: int, row: int, style: _Style, *, empty: str) -> str:
        if style.across == 1:
            return "*" if (column, row) in dots else empty
        bits = sum(
            bit
            for across, bits_down in enumerate(_BRAILLE_BITS)
            for down, bit in enumerate(bits_down)
            if (column * style.across + across, row * style.down + down) in dots
        )
        return chr(0x2800 + bits) if bits else empty

    def _column(self, x: float, width: int) -> int:
        first, end = self.pieces[0].first, self.pieces[-1].end
        return min(int((x - first) / max(end - first, 1) * width), width - 1)

    def _borders(self, columns: int) -> list[int]:
        return [self._column(piece.first, columns) for piece in self.pieces[1:]]

    def _numbers(self, columns: int) -> str:
        """Where each piece begins and the last one ends; a number that would touch another is left out, the
        last one never."""
        last = f"{self.pieces[-1].end:,}"
        text = ""
        for piece in self.pieces:
            number, column = f"{piece.first:,}", self._column(piece.first, columns)
            if (not text or len(text) < column) and column + len(number) < columns - len(last):
                text = f"{text:<{column}}{number}"
        return f"{text:<{columns - len(last)}}{last}"

    def _names(self, columns: int) -> str:
        """The name in the middle under each piece, cut to its width."""
        edges = [*(self._column(piece.first, columns) for piece in self.pieces), columns]
        cells = zip(self.pieces, pairwise(edges), strict=True)
        return "".join(
            f"{piece.name[: max(end - first - 1, 0)]:^{end - first}}" for piece, (first, end) in cells
        )
