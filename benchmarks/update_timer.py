"""When the updates of a run begin and end: the same stopwatch for trainers and for bare loops.

Owns what is timed. Updates before `warm_up` are not; then come `runs` stretches of `updates` each, with the
device awaited at their edges only, so that a host which runs ahead of it may; then `alone` updates that each
begin on an idle device, to see how long the host takes for one.
"""

from __future__ import annotations

import cProfile
import time
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How many updates; `warm_up` is at least 2, because the first one is looked at."""

    warm_up: int
    runs: int
    updates: int
    alone: int = 3

    @property
    def total(self) -> int:
        """All of them."""
        return self.warm_up + self.runs * self.updates + self.alone


@dataclass(slots=True)
class UpdateTimer:
    """Is told of every update that has been issued, and says when enough have been.

    Attributes:
        length: Of the measurement.
        profiler: Is on in the runs; its own cost is then in the times.
        seconds: Of wall time per update, of each run.
        cpu_seconds: The same of this process's CPU time, all threads together.
        host_seconds: From the begin of each update on an idle device until the host has issued it; where a
            loop waits for the device in an update, as DeepSpeed does, that is part of it.
    """

    length: Length
    profiler: cProfile.Profile | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    _done: int = 0
    _began: tuple[float, float] = (0.0, 0.0)

    @property
    def is_measuring(self) -> bool:
        """Whether the update that was just told of was inside of a run."""
        return 0 <= self._done - 1 - self.length.warm_up < self.length.runs * self.length.updates

    def after_update(self) -> bool:
        """Notes an update; returns whether it was the last one."""
        issued = _now()
        length = self.length
        self._done += 1
        measured = self._done - length.warm_up
        if measured < 0:
            return False
        if measured == 0 or measured % length.updates == 0 or measured > length.runs * length.updates:
            synchronize()
            self._note(measured, issued)
            self._profile(measured)
            self._began = _now()
        return self._done >= length.total

    def _profile(self, measured: int) -> None:
        if self.profiler is not None and measured == 0:
            self.profiler.enable()
        elif self.profiler is not None and measured == self.length.runs * self.length.updates:
            self.profiler.disable()

    def _note(self, measured: int, issued: tuple[float, float]) -> None:
        length = self.length
        if measured > length.runs * length.updates:
            self.host_seconds.append(issued[0] - self._began[0])
        elif measured > 0:
            now = _now()
            self.seconds.append((now[0] - self._began[0]) / length.updates)
            self.cpu_seconds.append((now[1] - self._began[1]) / length.updates)


def synchronize() -> None:
    """Waits for the device, if there is one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
