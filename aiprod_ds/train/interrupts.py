"""What is asked of a run from outside, by signals and by files in its folder, agreed by all ranks at the
boundary of an update.

Owns the signals, the files and the agreement (`SignalWatch`, `Interrupts`); the loop acts.

    SIGTERM, SIGUSR1 to any rank         save and leave
    its launcher is gone (`watchdog.py`) save and leave
    a file EVALUATE in the run folder    evaluate and go on
    a file SAVE in the run folder        save and go on
    a file STOP in the run folder        save and leave

A vote is cast at one boundary and read at the next, so that no update waits for it. Where updates take a
second or longer, a wait costs nothing beside them and a request must not take two of them: the vote is read
at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

from typing_extensions import Self

from aiprod_ds.engine import dist

LOOK_SECONDS = 1.0
_SLOW_UPDATE_MILLISECONDS = 1000
_LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A signal to the process group reaches the ranks once more through the launcher, whose handler sends SIGTERM
# to each of them.
ONE_REQUEST_SECONDS = 3.0


class Interrupt(IntEnum):
    """What was asked; of several the greatest counts."""

    NONE = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 3


class Interrupts:
    """The requests to one run.

    Args:
        watch: Knows of this rank's signals.
        folder: The run folder; only rank 0 looks into it, about once a second.
        finished: Returns a count that never falls, of which everybody wants to know the least of all ranks.
        wants_stop: Returns whether this rank has a reason of its own to save and leave.
        has_spiked: Returns whether this rank has found training to have gone wrong.
        now: Monotonic time in seconds; tests pass their own.

    Attributes:
        finished_by_all: The least count, as the last vote had it.
        has_any_spiked: Whether any rank had found a spike by the last vote.
    """

    def __init__(
        self,
        watch: SignalWatch,
        folder: Path,
        *,
        finished: Callable[[], int] = lambda: 0,
        wants_stop: Callable[[], bool] = lambda: False,
        has_spiked: Callable[[], bool] = lambda: False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watch = watch
        self._folder = folder
        self._finished = finished
        self._wants_stop = wants_stop
        self._has_spiked = has_spiked
        self._now = now
        self.finished_by_all = 0
        self.has_any_spiked = False
        self._ballot = dist.Ballot(4)
        self._is_cast = False
        self._are_updates_slow = False
        self._boundary_at = now()
        self._looked_at: float | None = None
        self._in_folder = Interrupt.NONE
        self._done_before: set[Interrupt] = set()  # asked for by files that cannot be removed

    def agreed(self, *, at_once: bool = False) -> Interrupt:
        """Returns what all ranks are to do now, the same on all. Collective; called between updates.

        Args:
            at_once: Whether to wait for the other ranks, so that a request that any of them has is not
                missed.
        """
        found = self._read() if self._is_cast else Interrupt.NONE
        if found is Interrupt.NONE:
            self._cast()
            if at_once or self._are_updates_slow:
                found = self._read()
        return found

    def is_stop_agreed(self) -> bool:
        """Returns whether all ranks are to stop, for work that takes longer than an update; what else is
        asked is left for the next boundary. Collective."""
        return self.agreed(at_once=True) is Interrupt.STOP

    def finish(self) -> None:
        """Reads the vote under way, after which nobody asks any more. Collective."""
        if self._is_cast:
            self._read()

    def done(self, request: Interrupt) -> None:
        """Takes away the file that asked for `request`, once it has been acted on; STOP has saved, but not
        evaluated. One that cannot be taken away, as on a disk that is read-only, is told once and asks
        for nothing more until it is gone. Collective."""
        dist.from_main(lambda: self._remove(request))
        self._in_folder = Interrupt.NONE

    def _remove(self, done: Interrupt) -> None:
        for request in (done, Interrupt.SAVE) if done is Interrupt.STOP else (done,):
            try:
                (self._folder / request.name).unlink(missing_ok=True)
            except OSError as error:
                self._done_before.add(request)
                _LOG.warning("request_not_removed name=%s error=%s; remove it", request.name, error)

    def _cast(self) -> None:
        now = self._now()
        milliseconds = round((now - self._boundary_at) * 1000)
        self._boundary_at = now
        self._ballot.cast((self._own(now), milliseconds, -self._finished(), self._has_spiked()))
        self._is_cast = True

    def _read(self) -> Interrupt:
        request, milliseconds, minus_finished, spiked = self._ballot.result()
        self.finished_by_all = -minus_finished
        self.has_any_spiked = bool(spiked)
        self._is_cast = False
        self._are_updates_slow = milliseconds >= _SLOW_UPDATE_MILLISECONDS
        return Interrupt(request)

    def _own(self, now: float) -> Interrupt:
        if self._watch.received is not None or self._wants_stop():
            return Interrupt.STOP
        if dist.is_main() and (self._looked_at is None or now - self._looked_at >= LOOK_SECONDS):
            self._looked_at = now
            self._in_folder = max(
                request for request in Interrupt if request is Interrupt.NONE or self._is_asked(request)
            )
        return self._in_folder

    def _is_asked(self, request: Interrupt) -> bool:
        is_there = os.path.exists(self._folder / request.name)  # noqa: PTH110  unlike `Path.exists` it never raises, as NFS may make it
        if not is_there:
            self._done_before.discard(request)
        return is_there and request not in self._done_before


class SignalWatch:
    """A context in which the first signal is noted and one that comes over 3 s later exits with 128 + its
    number.

    Outside the main thread, where Python sets no handlers, signals keep their meaning and `received` stays
    None.

    Attributes:
        received: The first signal that came; None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, _leave_to_thread)
            signal.siginterrupt(number, False)  # system calls of libraries go on
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, args=(reader,), name="signal_watch", daemon=True)
        self._thread.start()
        # A forked process, as a worker of the loader is, would write the numbers of its own signals into this
        # descriptor.
        os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            self._restore()
            self._thread.join()

    def _restore(self) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._writer.close()

    def leave(self, reason: str) -> None:
        """Asks this process to save and leave, as SIGTERM does."""
        if self.received is None:
            self.received, self._received_at = signal.SIGTERM, time.monotonic()
            _LOG.warning("leaving reason=%s; saving at the end of the update", reason)

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._meet(signal.Signals(number))

    def _meet(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
            _LOG.warning(
                "signal_received name=%s; saving at the end of the update, once more leaves at once",
                number.name,
            )
        elif now - self._received_at > ONE_REQUEST_SECONDS:
            os._exit(128 + number)


def _leave_to_thread(_number: int, _frame: FrameType | None) -> None:
    """Keeps the signal from ending the process."""
