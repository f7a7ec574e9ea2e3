"""A process that imports everything once and forks the ranks of one call after another, for tests that need
ranks more than a launcher.

Owns the server, its pipes and the end of all it has started. It has no threads and joins no group, so a fork
of it is like a process that has just finished importing. Called by `run_on_ranks` and `run_forked`. Executing
this module is the server's side; it ends with the process that started it.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from aiprod_ds.errors import EngineError
from aiprod_ds.testing.forked import fork_ranks, import_for_ranks, wait_for_ranks
from aiprod_ds.testing.processes import kill_session
from aiprod_ds.testing.rank import call_alone, call_on_this_rank

_SURVIVOR_SECONDS = 1.0  # as the launcher, which looks once a second whether a rank has failed
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksEnd:
    """How the ranks of a call ended.

    Attributes:
        codes: Exit codes in rank order, negative for signals.
        is_late: Whether they were killed for the time limit.
    """

    codes: tuple[int, ...]
    is_late: bool


class ForkServer:
    """A running server.

    Args:
        environment: It starts with; what is read when a process starts or a library is imported is read here.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  until close
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "aiprod_ds.testing.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )

    def call(
        self,
        call: Mapping[str, Any],
        *,
        ranks: int | None,
        environment: Mapping[str, str],
        output: Path,
        timeout_seconds: float,
    ) -> RanksEnd:
        """Runs `call_on_this_rank(call)` on new ranks in this process's working folder, and leaves no process
        behind.

        Args:
            call: As `call_on_this_rank` takes it.
            ranks: Processes. None for one that is no rank: it runs `call_alone(call)`.
            environment: All that they get, but for the launcher's variables.
            output: A file for what they write to stdout and stderr.
            timeout_seconds: They are killed after this time.

        Raises:
            EngineError: If the server has died; the message ends with its output.
        """
        request = {
            "call": dict(call),
            "ranks": ranks,
            "environment": dict(environment),
            "folder": str(Path.cwd()),
            "output": str(output),
            "timeout_seconds": timeout_seconds,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self._output.seek(0)
            raise EngineError(
                f"fork server: must answer, got its end. Read its output:\n{self._output.read()}"
            )
        end = json.loads(reply)
        return RanksEnd(codes=tuple(end["codes"]), is_late=end["is_late"])

    def close(self) -> None:
        """Ends the server and whatever ranks it still has."""
        with self._process as process, self._output:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                kill_session(process.pid)


_SERVERS: dict[int, ForkServer] = {}


def call_on_forked_ranks(
    call: Mapping[str, Any],
    *,
    ranks: int | None,
    environment: Mapping[str, str],
    output: Path,
    timeout_seconds: float,
) -> RanksEnd:
    """Does what `ForkServer.call` does, with a server of this process that stays for the next call.

    Raises:
        EngineError: As `ForkServer.call`.
    """
    own = os.getpid()  # a fork of the process that has the server needs its own
    if own not in _SERVERS:
        _SERVERS[own] = ForkServer(environment)
        atexit.register(_close, own)
    try:
        return _SERVERS[own].call(
            call, ranks=ranks, environment=environment, output=output, timeout_seconds=timeout_seconds
        )
    except BaseException:  # also a test's time limit: an answer that nobody read would be taken for the next
        _close(own)
        raise


def _close(own: int) -> None:
    server = _SERVERS.pop(own, None) if own == os.getpid() else None
    if server is not None:
        server.close()


# Below runs in the server.


def _serve() -> None:
    requests, replies = _take_pipes()
    import_for_ranks()
    for line in requests:
        request = json.loads(line)
        end = _run(request, lambda: not select.select([requests], [], [], 0)[0])
        replies.write(json.dumps(asdict(end)) + "\n")


def _take_pipes() -> tuple[TextIO, TextIO]:
    """Returns where requests come from and replies go, and keeps all that is executed here away from both."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


def _run(request: Mapping[str, Any], is_wanted: Callable[[], bool]) -> RanksEnd:
    """Forks ranks and waits for them; until it has replied nothing can come from the caller but its end."""
    began, limit = time.monotonic(), request["timeout_seconds"]
    ranks = request["ranks"]
    processes = fork_ranks(
        lambda: _be_called(request),
        ranks=ranks or 1,
        environment=request["environment"],
        is_launched=ranks is not None,
    )
    codes = wait_for_ranks(
        processes, timeout_seconds=limit, survivor_seconds=_SURVIVOR_SECONDS, is_wanted=is_wanted
    )
    for process in processes:
        kill_session(process)
    return RanksEnd(codes=tuple(codes), is_late=time.monotonic() - began > limit)


def _be_called(request: Mapping[str, Any]) -> int:
    os.setpgid(0, 0)  # what this rank starts ends with it
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    run = call_alone if request["ranks"] is None else call_on_this_rank
    run(request["call"])
    return 0


if __name__ == "__main__":
    _serve()
