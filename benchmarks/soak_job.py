"""One disturbed run: the service that keeps its command running, what disturbs it, and what each disturbance
cost.

Owns the disturbances and their moments. The service stands for a batch system: it starts the same command
again where the supervisor was killed or ended with 75, as `launch/slurm.sbatch` does; any other end, and
anything that this script would have to do for the run to go on, counts as a manual action. Called by
`soak.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from forked_launch import Job

SAVED = 75  # asked to stop, and saved
PATIENCE_SECONDS = 600.0
_Found = TypeVar("_Found")
_MOST_UNASKED = 3
_POLL_SECONDS = 0.004
_FULL_SECONDS = 2.0
_SPIKES = 4  # skipped updates after which the flag goes
_BEGINS = re.compile(r"training_begins update=(\d+)")
TRAINING, SAVE, START = "in training", "inside a save", "while it starts"
FIRST_SAVE, AFTER_FIRST_SAVE = "inside the first save", "after the first save"
RANK, LAUNCHER, SUPERVISOR = "SIGKILL of a rank", "SIGKILL of the launcher", "SIGKILL of the supervisor"
WORKER, HANG, TERM = "SIGKILL of a loader worker", "SIGSTOP of a rank", "SIGTERM"
FULL_DISK, SPIKE = "full disk", "spike"
MOMENTS = {
    RANK: (TRAINING, SAVE, SAVE, START),
    LAUNCHER: (TRAINING, SAVE, SAVE, START),
    SUPERVISOR: (TRAINING, SAVE, SAVE, START),
    WORKER: (TRAINING,),
    HANG: (TRAINING,),
    TERM: (TRAINING, SAVE, START),
    FULL_DISK: (TRAINING,),
    SPIKE: (TRAINING,),
}
"""By kind, as often as they are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What was done to a run, and what it cost.

    Attributes:
        kind: A key of `MOMENTS`.
        moment: In words.
        update: Done before it.
        lost: Of these, updates that were done again.
        has_cut_a_save: Whether a save was left unfinished.
        end_seconds: Until the ranks were gone; None where they need not go.
        pause_seconds: Until the run had come on by an update.
    """

    kind: str
    moment: str
    update: int
    lost: int
    has_cut_a_save: bool
    end_seconds: float | None
    pause_seconds: float


@dataclass(slots=True, kw_only=True)
class Service:
    """Keeps a command running until it ends with 0.

    Attributes:
        begin: Starts the supervisor and returns its number.
        starts: How often.
        unasked: Exit codes of supervisors that ended though nobody had told them to: manual actions.
    """

    begin: Callable[[], int]
    supervisor: int = 0
    starts: int = 0
    is_done: bool = False
    may_end: bool = False
    unasked: list[int] = field(default_factory=list)

    def tend(self) -> None:
        """Starts the supervisor if there is none, and notes its end."""
        if self.is_done:
            return
        if self.supervisor:
            process, status = os.waitpid(self.supervisor, os.WNOHANG)
            if not process:
                return
            code = os.waitstatus_to_exitcode(status)
            self.is_done = code == 0
            if not self.is_done and not (self.may_end and code in (SAVED, -signal.SIGKILL)):
                self.unasked.append(code)
                if len(self.unasked) == _MOST_UNASKED:
                    raise RuntimeError(f"the supervisor ended with {self.unasked}, and nobody had told it to")
            self.may_end = False
        if not self.is_done:
            self.supervisor = self.begin()
            self.starts += 1

    def job(self) -> Job:
        """Returns the processes that there are now."""
        return Job.of(self.supervisor)

    def kill(self) -> None:
        """Kills the supervisor and all that it has started."""
        job = self.job()
        if self.supervisor and not self.is_done:
            for process in (self.supervisor, *job.launchers, *job.ranks, *job.workers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


class DisturbedRun:
    """A run folder, its service and its log.

    Args:
        folder: The run folder.
        log: What all processes of the run say; a service's begin appends to it.
        service: Keeps it running.
        flag: The file that makes spikes.
        chance: Chooses ranks and moments.
    """

    def __init__(
        self, folder: Path, *, log: Path, service: Service, flag: Path, chance: random.Random
    ) -> None:
        self._folder, self._log, self._flag, self._chance = folder, log, flag, chance
        self.service = service
        self.disturbances: list[Disturbance] = []

    def disturb(self, kind: str, moment: str) -> bool:
        """Waits for a moment, disturbs and waits until training has come on; returns whether the run was
        still there.

        Args:
            kind: A key of `MOMENTS`.
            moment: Any.
        """
        if not self._reach(moment):
            return False
        job = self._await(lambda: self._whole(kind))
        if job is None:
            return False
        began, begins, update = time.monotonic(), len(self._begins()), self.updates()
        end_seconds, has_cut_a_save = None, False
        if kind == FULL_DISK:
            self._fill_disk(job)
        elif kind == SPIKE:
            self._spike()
        elif kind == WORKER:
            os.kill(self._chance.choice(job.workers), signal.SIGKILL)
        else:
            self._hit(kind, job)
            self._await(lambda: not any(map(_is_there, job.ranks)))
            end_seconds = time.monotonic() - began
            has_cut_a_save = any((self._folder / "checkpoints").glob("*.pending"))
        update = max(update, self.updates()) if end_seconds is None else self.updates()
        new = self._await(lambda: self._has_come_on(begins, update, end_seconds is not None))
        if new is None and not self.service.is_done:
            raise RuntimeError(f"{kind} {moment}: the run did not come on, see {self._log}")
        later = self._begins()[begins:]
        self.disturbances.append(
            Disturbance(
                kind=kind,
                moment=moment,
                update=update,
                has_cut_a_save=has_cut_a_save,
                lost=max((update - begin for begin in later[:1]), default=0),
                end_seconds=end_seconds,
                pause_seconds=time.monotonic() - began,
            )
        )
        return True

    def finish(self) -> None:
        """Waits for the end of the run."""
        if self._await(lambda: self.service.is_done or None) is None and not self.service.is_done:
            raise RuntimeError(f"the run did not end, see {self._log}")

    def updates(self) -> int:
        """Returns how many updates the run's metrics tell of."""
        return last_update(self._folder / "metrics.jsonl")

    def starts(self) -> int:
        """Returns how often training has begun."""
        return len(self._begins())

    def _begins(self) -> list[int]:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return [int(found) for found in _BEGINS.findall(text)]

    def _reach(self, moment: str) -> bool:
        """Waits for a moment and returns whether the run is still there."""
        checkpoints = self._folder / "checkpoints"
        wanted = self.updates() + self._chance.randint(3, 12)
        if moment == START:
            self._await(lambda: bool(self.service.job().ranks) or None)
            self._sleep(self._chance.uniform(0.0, 2.0))
        elif moment == AFTER_FIRST_SAVE:
            self._await(lambda: any(checkpoints.glob("update_*[0-9]")) or None)
            self._sleep(self._chance.uniform(0.0, 0.05))
        else:
            if moment != FIRST_SAVE:
                self._await(lambda: self.updates() >= wanted or None)
            if moment != TRAINING:
                self._await(lambda: any(checkpoints.glob("*.pending")) or None)
                time.sleep(self._chance.uniform(0.0, 0.03))
        self.service.tend()
        return not self.service.is_done

    def _whole(self, kind: str) -> Job | None:
        """Returns the processes of the run once those that `kind` is about are there."""
        job = self.service.job()
        is_whole = bool(job.workers) if kind == WORKER else bool(job.ranks and job.launchers)
        return job if is_whole else None

    def _hit(self, kind: str, job: Job) -> None:
        number = getattr(signal, kind.split(maxsplit=1)[0])
        if kind in (TERM, SUPERVISOR):
            self.service.may_end = True
            target = self.service.supervisor
        else:
            target = self._chance.choice(job.launchers if kind == LAUNCHER else job.ranks)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(target, number)

    def _has_come_on(self, begins: int, update: int, has_ended: bool) -> bool | None:
        if has_ended and len(self._begins()) <= begins:
            return None
        seen = self._begins()[begins:]
        return (self.updates() > (seen[-1] if seen else update)) or None

    def _fill_disk(self, job: Job) -> None:
        filler = self._folder.parent / "filler"
        free = shutil.disk_usage(self._folder).free
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(max(0, free - self._chance.choice((0, 20_000, 150_000)))))
        deadline = time.monotonic() + _FULL_SECONDS
        while time.monotonic() < deadline and all(map(_is_there, job.ranks)):
            self._sleep(0.05)
        filler.unlink()

    def _spike(self) -> None:
        before = self._log.read_text(errors="replace").count("update_skipped")
        self._flag.touch()
        self._await(
            lambda: self._log.read_text(errors="replace").count("update_skipped") >= before + _SPIKES or None,
            seconds=10.0,
        )
        self._flag.unlink()

    def _await(
        self, found: Callable[[], _Found | None], *, seconds: float = PATIENCE_SECONDS
    ) -> _Found | None:
        """Returns what `found` does, once that is true; None when the run has ended or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.service.is_done:
            value = found()
            if value:
                return value
            self.service.tend()
            time.sleep(_POLL_SECONDS)
        return None

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.service.tend()
            time.sleep(_POLL_SECONDS)


def last_update(metrics: Path) -> int:
    """Returns the update of the last whole row of a file that is being written; 0 without one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    return next(_updates_of(reversed(lines)), 0)


def _updates_of(lines: Iterator[bytes]) -> Iterator[int]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            yield int(json.loads(line)["update"])


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
