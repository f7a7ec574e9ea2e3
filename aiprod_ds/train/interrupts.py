"""What is asked of a run from outside, by signals and by files in its folder, agreed by all ranks at the boundary of an update.

Owns the agreement and the files. `signal_watch.py` receives the signals; the loop acts.

    SIGTERM, SIGUSR1 to any rank     save and leave
    a file SAVE in the run folder    save and go on
    a file STOP in the run folder    save and leave

A vote is cast at one boundary and read at the next, so that no update waits for it. Where updates take a second or longer, a wait
costs nothing beside them and a request must not take two of them: the vote is read at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from aiprod_ds.checkpoint.disk import explained
from aiprod_ds.engine import dist
from aiprod_ds.train.signal_watch import SignalWatch

LOOK_SECONDS = 1.0
_SLOW_UPDATE_MILLISECONDS = 1000


class Request(IntEnum):
    """What was asked; of several the greatest counts."""

    NONE = 0
    SAVE = 1
    STOP = 2


class Requests:
    """The requests to one run.

    Args:
        watch: Knows of this rank's signals.
        folder: The run folder; only rank 0 looks into it, about once a second.
        finished: Returns a count that never falls, of which everybody wants to know the least of all ranks.
        now: Monotonic time in seconds; tests pass their own.

    Attributes:
        finished_by_all: The least count, as the last vote had it.
    """

    def __init__(
        self,
        watch: SignalWatch,
        folder: Path,
        *,
        finished: Callable[[], int] = lambda: 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watch = watch
        self._folder = folder
        self._finished = finished
        self._now = now
        self.finished_by_all = 0
        self._ballot = dist.Ballot(3)
        self._is_cast = False
        self._are_updates_slow = False
        self._boundary_at = now()
        self._looked_at: float | None = None
        self._in_folder = Request.NONE

    def agreed(self, *, at_once: bool = False) -> Request:
        """Returns what all ranks are to do now, the same on all. Collective; called between updates.

        Args:
            at_once: Whether to wait for the other ranks, so that a request that any of them has is not missed.
        """
        found = self._read() if self._is_cast else Request.NONE
        if found is Request.NONE:
            self._cast()
            if at_once or self._are_updates_slow:
                found = self._read()
        return found

    def done(self, request: Request) -> None:
        """Takes away the files that asked for `request` or less, once it has been acted on. Collective.

        Raises:
            CheckpointError: If a file cannot be removed.
        """
        dist.from_main(lambda: self._remove(request))
        self._in_folder = Request.NONE

    def _remove(self, done: Request) -> None:
        with explained(self._folder):
            for request in (Request.SAVE, Request.STOP):
                if request <= done:
                    (self._folder / request.name).unlink(missing_ok=True)

    def _cast(self) -> None:
        now = self._now()
        milliseconds = round((now - self._boundary_at) * 1000)
        self._boundary_at = now
        self._ballot.cast((self._own(now), milliseconds, -self._finished()))
        self._is_cast = True

    def _read(self) -> Request:
        request, milliseconds, minus_finished = self._ballot.result()
        self.finished_by_all = -minus_finished
        self._is_cast = False
        self._are_updates_slow = milliseconds >= _SLOW_UPDATE_MILLISECONDS
        return Request(request)

    def _own(self, now: float) -> Request:
        if self._watch.received is not None:
            return Request.STOP
        if dist.is_main() and (self._looked_at is None or now - self._looked_at >= LOOK_SECONDS):
            self._looked_at = now
            self._in_folder = max(request for request in Request if request is Request.NONE or self._is_asked(request))
        return self._in_folder

    def _is_asked(self, request: Request) -> bool:
        return os.path.exists(self._folder / request.name)  # noqa: PTH110  unlike `Path.exists` it never raises, as NFS may make it
