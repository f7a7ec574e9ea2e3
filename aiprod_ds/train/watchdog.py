"""Finds a run that does not come on, says where every rank stands, and ends it.

What counts is progress of the thread that trains: each change of activity, each clip that is evaluated, each
step that `aiprod_ds.progress` counts. A thread of this module looks at how long ago the last was, and never
makes one itself. Owns the limits and the end; the words are `hang_report.py`'s.

    limit = max(hang_seconds, 5 x the 99th percentile of the same activity)

An activity that is known to take long has a multiple of `hang_seconds` in its place: 10 for evaluations and
checkpoints, 30 for the start, a change of phase and what is done for the first time. On a hang every rank
writes the stacks of its threads to `hangs/` of the run folder, the one that found it names activity and
ranks, and all end with `HUNG`. If what blocks is the data of the only rank, its main thread is called back
instead, saves and leaves. A launcher that is gone asks the run to save and leave, too.

Nothing here uses collectives: a hang is often inside one. Ranks talk through the group's store.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from typing_extensions import Self

from aiprod_ds import progress
from aiprod_ds.errors import HangError
from aiprod_ds.metrics.stopwatch import Activity
from aiprod_ds.train.hang_report import RankStatus, innermost, is_waiting_for_others, verdict
from aiprod_ds.train.orphans import Launchers

HUNG = 76  # beyond 75, which says that the run has saved
FOLDER = "hangs"
Data = TypeVar("Data")
_LOG = logging.getLogger(__name__)
_PERCENTILE, _FACTOR, _KNOWN = 0.99, 5.0, 1000
_LONG, _MIDDLE = 30, 10
_MULTIPLES = {
    Activity.START: _LONG,
    Activity.TRANSITION: _LONG,
    Activity.EVALUATION: _MIDDLE,
    Activity.CHECKPOINT: _MIDDLE,
}
# After a request to stop, data that do not come are not waited for as long: who sent it kills after 30 s.
_BLOCKED_SHARE = 0.25
_LOOKS, _MOST_LOOK_SECONDS = 20, 1.0
_GATHER_SHARE, _MOST_GATHER_SECONDS = 1 / 6, 10.0
_STOPPED_LOOKS = 20
_PREFIX = "aiprod_ds/hang"
# Of the signals that no program or batch system sends.
_CALL_BACK = signal.SIGRTMIN + 3


class Stops(Protocol):
    """What was asked of this process from outside."""

    @property
    def received(self) -> signal.Signals | None:
        """The signal that asks to save and leave; None before."""

    def leave(self, reason: str) -> None:
        """Asks for the same from inside."""


class _CalledBackError(BaseException):
    """Takes the main thread out of a wait. No `Exception`: readers take each of those for a clip that cannot
    be read."""


class Watchdog:
    """A context that watches the main thread of this rank.

    Args:
        folder: The run folder, into whose `hangs` the stacks go.
        least_seconds: The smallest limit; None: hangs are not looked for.
        stops: Signals of this process.
        rank: Of this process.
        world_size: All ranks.
        store: Connects to the group's store; not called for one rank.

    Attributes:
        update: Where the run stands, for messages.
    """

    def __init__(
        self,
        folder: Path,
        *,
        least_seconds: float | None,
        stops: Stops,
        rank: int = 0,
        world_size: int = 1,
        store: Callable[[timedelta], Any] | None = None,
    ) -> None:
        self._folder, self._least, self._stops = folder, least_seconds, stops
        self._rank, self._world_size, self._connect = rank, world_size, store
        self._look_seconds = min((least_seconds or math.inf) / _LOOKS, _MOST_LOOK_SECONDS)
        self._gather_seconds = min((least_seconds or math.inf) * _GATHER_SHARE + 1.0, _MOST_GATHER_SECONDS)
        self._activity, self._since, self._is_first = Activity.START, time.monotonic(), True
        self._known = {activity: deque[float](maxlen=_KNOWN) for activity in Activity}
        self._seen: set[Any] = set()
        self._working = 0
        self._can_call_back = False
        self._call: str | None = None  # why the main thread is called back
        self._request: str | None = None  # of another rank
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._handler: Any = None
        self.update = 0

    def __enter__(self) -> Self:
        self._since, self._main = time.monotonic(), threading.get_ident()
        self._launchers = Launchers.of_this_process()
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(_CALL_BACK, self._be_called_back)
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._least is not None and self._world_size > 1 and self._connect is not None:
            self._threads.append(threading.Thread(target=self._listen, name="watchdog_listens", daemon=True))
        self._listening = ExitStack()
        self._listening.enter_context(progress.told_to(self))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        self._ended.set()
        if self._least is not None:
            faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(timeout=5.0)
        if self._handler is not None:
            signal.signal(_CALL_BACK, self._handler)

    def enter(self, activity: Activity) -> None:
        """Notes that the main thread goes on with `activity`."""
        self.beat()
        self._activity = activity

    def stepped(self) -> None:
        """See `progress.Listener`."""
        self.beat()

    def began_to_work(self) -> None:
        """See `progress.Listener`; takes as long as it takes."""
        self._work(1)

    def ended_to_work(self) -> None:
        """See `progress.Listener`."""
        self._work(-1)

    def beat(self) -> None:
        """Notes that the watched thread has come on; how long it took counts for the activity that it is
        at."""
        if threading.get_ident() != self._main:
            return
        now = time.monotonic()
        self._known[self._activity].append(now - self._since)
        self._since, self._is_first = now, False

    def begin(self, what: Any) -> None:
        """Notes that the main thread begins `what`, which takes long the first time: kernels are made for it.

        Args:
            what: Names the shape of a micro-batch.
        """
        if what not in self._seen:
            self._seen.add(what)
            self._is_first = True

    def await_data(self, wait: Callable[[], Data]) -> Data:
        """Returns what `wait` does.

        Raises:
            HangError: If it does not end, and nobody waits for this rank.
        """
        self._can_call_back = self._world_size == 1 and self._handler is not None
        try:
            return wait()
        except _CalledBackError as called:
            reason = str(called)
        finally:
            self._can_call_back = False
        # Outside of the handler: an exception that holds the wait's frames would keep the loader's processes.
        raise HangError(reason, was_asked=self._stops.received is not None)

    def note_lost_rank(self) -> None:
        """Writes the stacks of this rank, which is about to end because another one is gone."""
        self.write_stacks(self._name())

    def write_stacks(self, name: str) -> Path:
        """Writes the stacks of all threads of this process and returns the file; without room, or on a disk
        that blocks, it is not there."""
        folder = self._folder / FOLDER / name
        path = folder / f"rank_{self._rank}.txt"

        def write() -> None:
            with suppress(OSError):
                _make(folder)
                with path.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                _write_flight_record(folder / f"rank_{self._rank}.flight_record")

        writer = threading.Thread(target=write, name="watchdog_writes", daemon=True)
        writer.start()
        writer.join(timeout=self._gather_seconds)
        return path

    def limit(self) -> float:
        """Returns after how many seconds without progress the activity under way counts as hung."""
        least = self._least or math.inf
        if self._is_first or self._working:
            return _LONG * least
        known = sorted(self._known[self._activity])
        usual = known[math.ceil(_PERCENTILE * len(known)) - 1] if known else 0.0
        return max(least * _MULTIPLES.get(self._activity, 1), _FACTOR * usual)

    def _work(self, step: int) -> None:
        if threading.get_ident() == self._main:
            self.beat()
            self._working += step

    def _watch(self) -> None:
        looked_at, launchers = time.monotonic(), self._launchers
        while not self._ended.wait(self._look_seconds):
            now = time.monotonic()
            if now - looked_at > _STOPPED_LOOKS * self._look_seconds:
                self._since = now  # this process was itself stopped: that says nothing of its main thread
            looked_at = now
            gone = launchers.gone()
            if gone is not None and self._stops.received is None:
                self._stops.leave(f"{gone} is gone, which started this process")
            if self._least is None:
                continue
            # Before the time: what the main thread begins in between may have a smaller limit, but is young.
            limit = self.limit()
            # Where the interpreter's lock is never given back, no thread of Python's can look. To the
            # descriptor: what stands for standard error, as in a notebook, may have none.
            faulthandler.dump_traceback_later(2 * limit + self._gather_seconds, exit=True, file=2)
            if self._request is not None:
                self._end(self._request, is_finder=False)
            problem = self._problem(time.monotonic() - self._since, limit)
            if problem is not None and not self._call_back(problem):
                self._find(problem)

    def _problem(self, quiet: float, limit: float) -> str | None:
        stop = self._stops.received
        if quiet > limit:
            return (
                f"no progress for {quiet:.0f} s in {self._activity.value}, where {limit:.0f} s are the limit"
            )
        blocked = (self._least or math.inf) * _BLOCKED_SHARE
        if stop is not None and self._activity is Activity.DATA_WAIT and quiet > blocked:
            return f"asked to stop by {stop.name} while no data came for {quiet:.0f} s"
        return None

    def _call_back(self, problem: str) -> bool:
        """Returns whether the main thread has come back from waiting for data."""
        if not self._can_call_back or self._call is not None:
            return False
        where = innermost(self._main)
        path = self.write_stacks(self._name())
        self._call = f"{problem}; it was at {where}. Stacks: {path}"
        before = self._since
        signal.pthread_kill(self._main, _CALL_BACK)
        deadline = time.monotonic() + self._gather_seconds
        while time.monotonic() < deadline:
            if self._since != before or self._ended.wait(self._look_seconds / 4):
                return True
        return False

    def _be_called_back(self, _number: int, _frame: FrameType | None) -> None:
        if self._can_call_back and self._call is not None:
            raise _CalledBackError(self._call)

    def _name(self) -> str:
        return f"update_{self.update:06d}"

    def _find(self, problem: str) -> None:
        request = json.dumps({"rank": self._rank, "problem": problem, "name": self._name()})
        if self._world_size > 1 and self._connect is not None:
            with suppress(RuntimeError):
                store = self._connect(timedelta(seconds=self._gather_seconds))
                request = store.compare_set(f"{_PREFIX}/request", "", request).decode()
        self._end(request, is_finder=json.loads(request)["rank"] == self._rank)

    def _listen(self) -> None:
        """Looks for what another rank has found."""
        assert self._connect is not None
        with suppress(RuntimeError):  # the rank that holds the store is gone: `PeerWatch` ends this one
            store = self._connect(timedelta(seconds=self._gather_seconds))
            while not self._ended.wait(self._look_seconds):
                if store.check([f"{_PREFIX}/request"]):
                    self._request = store.get(f"{_PREFIX}/request").decode()
                    return

    def _end(self, request: str, *, is_finder: bool) -> None:
        """Writes what is known, and ends this process."""
        found = json.loads(request)
        status = RankStatus(
            rank=self._rank,
            host=socket.gethostname(),
            update=self.update,
            activity=self._activity.value,
            seconds=time.monotonic() - self._since,
            where=innermost(self._main),
            is_waiting=is_waiting_for_others(self._main),
        )
        self.write_stacks(found["name"])
        statuses = {self._rank: status}
        if self._world_size > 1 and self._connect is not None:
            with suppress(RuntimeError):
                self._meet(statuses, is_finder=is_finder)
        if is_finder:
            words = verdict(found["problem"], statuses, world_size=self._world_size)
            folder = self._folder / FOLDER / found["name"]
            _LOG.error("hang_found %s. Stacks: %s", words, folder)
            writer = threading.Thread(target=_write_verdict, args=(folder, words), daemon=True)
            writer.start()
            writer.join(timeout=self._gather_seconds / 2)
        os._exit(HUNG)

    def _meet(self, statuses: dict[int, RankStatus], *, is_finder: bool) -> None:
        """Posts what this rank knows of itself; the finder reads what the others do."""
        assert self._connect is not None
        store = self._connect(timedelta(seconds=self._gather_seconds))
        key = f"{_PREFIX}/status/"
        store.set(f"{key}{self._rank}", statuses[self._rank].to_json())
        deadline = time.monotonic() + self._gather_seconds
        while time.monotonic() < deadline:
            if not is_finder:
                if store.check([f"{_PREFIX}/read"]):
                    return
            else:
                for rank in set(range(self._world_size)) - set(statuses):
                    if store.check([f"{key}{rank}"]):
                        statuses[rank] = RankStatus.from_json(store.get(f"{key}{rank}").decode())
                if len(statuses) == self._world_size:
                    break
            time.sleep(0.1)
        if is_finder:
            store.set(f"{_PREFIX}/read", "1")
            if self._rank == 0:
                time.sleep(1.0)  # the store ends with this process


def _make(folder: Path) -> None:
    """Makes a folder of one report; no run folder beside a mount that is gone."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)


def _write_verdict(folder: Path, words: str) -> None:
    with suppress(OSError):
        _make(folder)
        (folder / "verdict.txt").write_text(words + "\n", encoding="utf-8")


def _write_flight_record(path: Path) -> None:
    """Writes what NCCL's flight recorder knows of collectives, if there is one."""
    import torch

    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None and torch.cuda.is_available():
        with suppress(RuntimeError):
            path.write_bytes(dump())
