"""`aiprod-ds launch` with ranks forked from this process, which has imported everything: a start takes about
two seconds in place of ten and more.

The restart rule and the supervisor are those of `aiprod_ds.cluster`; DeepSpeed's launcher has a stand-in, a
process that ends its ranks when one fails. Hosts and configuration are not examined. Also finds the processes
of a launch, forked or not, by what they are. Called by `soak.py` and its test.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from aiprod_ds.cluster.completion import Report
from aiprod_ds.cluster.start import Request, judged, start
from aiprod_ds.cluster.supervise import Supervisor
from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks
from aiprod_ds.train.orphans import Launchers

_LAUNCHER, _RANK = "forked_launcher", "forked_rank"
_SET_NAME = 15  # PR_SET_NAME, see prctl(2)
# DeepSpeed's launcher gives ranks 30 s to end after one has failed.
_SURVIVOR_SECONDS = 10.0
_ATTEMPT_SECONDS = 600.0
_RANK_COMMAND, _LAUNCHER_COMMAND = (
    re.compile(r"-m aiprod_ds train "),
    re.compile(r"-m deepspeed\.launcher|/deepspeed/launcher/"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The processes of a launch.

    Attributes:
        launchers: Between the supervisor and the ranks, the first one first.
        ranks: In the order in which they were started.
        workers: Of the ranks' loaders.
    """

    launchers: tuple[int, ...]
    ranks: tuple[int, ...]
    workers: tuple[int, ...]

    @classmethod
    def of(cls, supervisor: int) -> Job:
        """Returns what there is now among the descendants of `supervisor`."""
        launchers: list[int] = []
        ranks: list[int] = []
        workers: list[int] = []
        for process, parent in _descendants(supervisor):
            if parent in ranks:  # a fork of it; torch gives workers another name
                workers += [process] if _words(process) == _words(parent) else []
            elif _is_rank(process):
                ranks.append(process)
            elif _is_launcher(process):
                launchers.append(process)
        return cls(launchers=tuple(launchers), ranks=tuple(sorted(ranks)), workers=tuple(workers))


def fork_launch(request: Request, work: Callable[[Request], int], *, ranks: int, output: Path) -> int:
    """Starts a supervisor in a process of its own, which ends with the exit code of `launch`, and returns its
    number.

    Args:
        request: Of it count `run_folder`, `resume` and `max_restarts`.
        work: What a rank does; gets the request of its start and returns the exit code.
        ranks: Processes.
        output: A file that gets what all of them say.
    """
    supervisor = os.fork()
    if supervisor == 0:
        code = 1
        try:
            os.setsid()
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = start(request, Console(stderr=True), once=partial(_start_once, work, ranks))
        finally:
            os._exit(code)
    return supervisor


def _start_once(
    work: Callable[[Request], int], ranks: int, request: Request, _console: Console
) -> tuple[int, bool]:
    report = Report.of(request.run_folder)
    os.environ.update(Launchers.environment_of_this_process())
    # A fork has the command line of the process that it comes from.
    supervisor = Supervisor(pattern=re.escape(" ".join(sys.argv)))
    code = supervisor.follow(lambda: _ForkedLauncher(partial(work, request), ranks))
    return judged(code, report), supervisor.is_stopped


class _ForkedLauncher:
    """A process that starts ranks and ends with the exit code of the first that fails."""

    def __init__(self, work: Callable[[], int], ranks: int) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _name(_LAUNCHER)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the supervisor's go to all of the session
            codes = wait_for_ranks(
                fork_ranks(partial(_work, work), ranks=ranks),
                timeout_seconds=_ATTEMPT_SECONDS,
                survivor_seconds=_SURVIVOR_SECONDS,
            )
            os._exit(next((code % 256 for code in codes if code), 0))

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        code = self._ended(0)
        assert code is not None
        return code

    def _ended(self, options: int) -> int | None:
        if self._code is None:
            process, status = os.waitpid(self.pid, options)
            if process:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _work(work: Callable[[], int]) -> int:
    _name(_RANK)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    return work()


def _name(name: str) -> None:
    ctypes.CDLL(None).prctl(_SET_NAME, name.encode(), 0, 0, 0)


def _descendants(process: int) -> list[tuple[int, int]]:
    """Returns them with their parents, parents first."""
    found = []
    try:
        threads = os.listdir(f"/proc/{process}/task")  # noqa: PTH208  names of a folder that may go at once
    except OSError:
        return []
    for thread in threads:
        for child in map(int, _read(f"/proc/{process}/task/{thread}/children").split()):
            found += [(child, process), *_descendants(child)]
    return found


def _is_rank(process: int) -> bool:
    return _comm(process) == _RANK or _RANK_COMMAND.search(_words(process)) is not None


def _is_launcher(process: int) -> bool:
    return _comm(process) == _LAUNCHER or _LAUNCHER_COMMAND.search(_words(process)) is not None


def _comm(process: int) -> str:
    return _read(f"/proc/{process}/comm").strip()


def _words(process: int) -> str:
    return _read(f"/proc/{process}/cmdline").replace("\0", " ")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
