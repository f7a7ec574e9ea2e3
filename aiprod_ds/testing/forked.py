"""Ranks forked from a process that has imported everything, for tests that end many runs: an attempt takes
about two seconds.

Owns the fork, the launcher's environment of each rank and the wait for its end. The ranks are real processes
with a gloo group of their own; whoever forks them must not have joined a group.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Callable

from aiprod_ds.testing.dist import free_port

_SURVIVOR_SECONDS = 30.0


def fork_ranks(work: Callable[[], int], *, ranks: int) -> list[int]:
    """Starts `work` on each of `ranks` new processes, which exit with what it returns, or 1 if it raises;
    returns their ids.

    A single rank gets no launcher's environment.
    """
    port = free_port()
    # every engine that closes collects garbage, and all that is imported would be looked through again
    gc.freeze()
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            _be_rank(work, rank, ranks, port)
        processes.append(process)
    return processes


def wait_for_ranks(processes: list[int], *, timeout_seconds: float = 120.0) -> list[int]:
    """Returns the exit codes, negative for signals; a rank that outlives a failed one by 30 s, or the time
    limit, is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(codes) < len(processes):
        for process in (process for process in processes if process not in codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process] != 0:
                    deadline = min(deadline, time.monotonic() + _SURVIVOR_SECONDS)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


def _be_rank(work: Callable[[], int], rank: int, ranks: int, port: int) -> None:
    code = 1
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = work()
    except BaseException:
        logging.getLogger(__name__).exception("rank %d", rank)
    finally:
        os._exit(code)
