"""The line of `aiprod_ds.progress` on a rich console: drawn over and over in a terminal, written elsewhere.

Shows nothing else; while a run trains, `console.py` shows progress inside its own block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from aiprod_ds import progress

if TYPE_CHECKING:
    from rich.live import Live


class ProgressLine:
    """Shows one line at a time.

    Args:
        console: Where. A thread of `progress.working` may draw too; rich locks its consoles.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    @property
    def is_live(self) -> bool:
        """See `Display`."""
        return self._console.is_terminal

    def draw(self, line: str | None) -> None:
        """See `Display`."""
        from rich.live import Live

        if line is None:
            live, self._live = self._live, None
            if live is not None:
                live.stop()
            return
        if self._live is None:
            # Nothing refreshes by itself: worker processes may be forked between two steps.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(line, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)

    def write(self, line: str) -> None:
        """See `Display`."""
        with suppress(OSError):  # standard error may be a file, on a disk that is full
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def shown_on(console: Console | None) -> Iterator[None]:
    """Shows progress of the block on `console`; None shows nothing more than before."""
    if console is None:
        yield
        return
    line = ProgressLine(console)
    progress.show_on(line)
    try:
        yield
    finally:
        line.draw(None)
        progress.hide(line)
