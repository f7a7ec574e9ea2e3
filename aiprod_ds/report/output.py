"""Where text goes: to a terminal, which wraps and redraws, or to a file, in which no line is wrapped.

Owns how the two differ. The command line opens its consoles and its log here.
"""

from __future__ import annotations

import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler

# Not without end: a table or a plot may fill the width that it is given.
_FILE_WIDTH = 1000


def open_console(*, stderr: bool = False) -> Console:
    """Returns a console on standard output or standard error.

    Where that is no terminal, lines are as long as they are; rich would take it to be 80 columns wide. The
    variable COLUMNS sets another width, as it does for a terminal.
    """
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _FILE_WIDTH
    return console


def log_handler(console: Console) -> logging.Handler:
    """Returns what writes log records to `console`: in columns in a terminal, else one line for each."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        return handler
    handler = _FileHandler(console.file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler


class _FileHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 knows no argument
    """Loses what a full disk does not take, without the traceback of `logging`."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  of `logging`
        """See `logging.Handler.handleError`."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
