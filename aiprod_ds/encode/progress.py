"""How far encoding is: a bar in a terminal, plain lines in a log file. Main rank only.

No refresh thread, so that worker processes can be forked at any time.
"""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0
_log = logging.getLogger(__name__)


class EncodeProgress:
    """Shows the entries of this rank as they are written; the other ranks have as many.

    Args:
        console: Where to draw; None shows nothing.
        title: What is encoded.
        total: Tasks of this rank.
    """

    def __init__(self, console: Console | None, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._failed = 0
        self._shows_lines = console is not None and not console.is_terminal
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, auto_refresh=False)
            self._bar.start()
            self._bar.add_task(title, total=total)

    def advance(self, *, failed: bool) -> None:
        """Counts one task."""
        self._done += 1
        self._failed += failed
        if self._bar is not None:
            description = f"{self._title}, {self._failed} failed" if self._failed else self._title
            self._bar.update(
                self._bar.task_ids[0], completed=self._done, description=description, refresh=True
            )
        is_due = time.monotonic() - self._last_line >= _LINE_SECONDS or self._done == self._total
        if self._shows_lines and is_due:
            self._last_line = time.monotonic()
            _log.info(
                "encoding %s: done=%d of=%d failed=%d", self._title, self._done, self._total, self._failed
            )

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
