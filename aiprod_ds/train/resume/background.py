"""One piece of work at a time in a thread of its own, counted, so that ranks can agree on how far all of them
are.

Writing files and hashing release the interpreter's lock, so training goes on beside it; docs/decisions.md has
the measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """Runs work in a daemon thread: a process that ends by an error does not wait for it.

    Attributes:
        started: Pieces of work so far.
        finished: Those of them that have ended, well or not.
    """

    def __init__(self) -> None:
        self.started = 0
        self.finished = 0
        self._outcome: Future[Any] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the last piece of work has not ended yet."""
        return self.finished < self.started

    def start(self, work: Callable[[], Any]) -> None:
        """Begins `work`; the one before it has ended."""
        assert not self.is_running, "one at a time"
        self.started += 1
        outcome: Future[Any] = Future()
        self._outcome = outcome
        threading.Thread(target=self._run, args=(work, outcome), name="background", daemon=True).start()

    def result(self) -> Any:
        """Waits for the work, and returns or raises what it did."""
        assert self._outcome is not None, "something was started"
        return self._outcome.result()

    def _run(self, work: Callable[[], Any], outcome: Future[Any]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            self.finished += 1
            outcome.set_exception(error)
        else:
            self.finished += 1
            outcome.set_result(result)
