"""Ranks forked from a process that has imported everything, for tests that end many runs: an attempt takes
about two seconds.

Owns the fork, the launcher's environment of each rank and the wait for its end. The ranks are real processes
with a gloo group of their own; whoever forks them must not have joined a group.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping

from aiprod_ds.testing.processes import free_port
from aiprod_ds.testing.rank import ask_for_the_cpu_once

# What ranks of this project import sooner or later: together ten seconds of a process. Others load much of it
# only when they need it, as DeepSpeed loads torch's compiler with its first engine.
_IMPORTED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.serialization",
    "deepspeed.comm.mori",
    "deepspeed.module_inject",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles at import, so that torch fills its tables
    "rich._emoji_codes",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "torchmetrics.functional.audio",
    "torchmetrics.functional.image",
    "aiprod_ds.engine.deepspeed_engine",
    "aiprod_ds.models.lora",
    "aiprod_ds.trainers.audio_vae",
    "aiprod_ds.trainers.diffusion",
    "aiprod_ds.trainers.video_vae",
    "aiprod_ds.encode.run",
    "aiprod_ds.testing.runs",
    "pytest",
)
_SURVIVOR_SECONDS = 30.0


def import_for_ranks() -> None:
    """Imports what ranks of this project need, so that those forked from now on need not.

    Starts no threads: whoever calls this may fork.
    """
    for name in _IMPORTED:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is not None:  # a user's project may do without pytest
            importlib.import_module(name)
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # a process that has asked a GPU cannot be forked
        importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  DeepSpeed tries a compiler
    ask_for_the_cpu_once()


def fork_ranks(
    work: Callable[[], int],
    *,
    ranks: int,
    environment: Mapping[str, str] | None = None,
    is_launched: bool = True,
) -> list[int]:
    """Starts `work` on each of `ranks` new processes, which exit with what it returns, or 1 if it raises.

    Args:
        work: To be done.
        ranks: Processes.
        environment: Theirs in place of this process's.
        is_launched: Whether they get the variables that a launcher sets; a single rank needs none.

    Returns:
        Their ids.
    """
    port = free_port()
    # every engine that closes collects garbage, and all that is imported would be looked through again
    gc.freeze()
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            _be_rank(work, environment, _launched(rank, ranks, port) if is_launched else {})
        processes.append(process)
    return processes


def wait_for_ranks(
    processes: list[int],
    *,
    timeout_seconds: float = 120.0,
    survivor_seconds: float = _SURVIVOR_SECONDS,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[int]:
    """Returns the exit codes, negative for signals, once all have ended.

    Args:
        processes: From `fork_ranks`.
        timeout_seconds: A rank that takes longer is killed.
        survivor_seconds: So is one that outlives a failed one by more than this.
        is_wanted: Asked again and again; False kills all at once.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(codes) < len(processes):
        if not is_wanted():
            deadline = 0.0
        for process in (process for process in processes if process not in codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process] != 0:
                    deadline = min(deadline, time.monotonic() + survivor_seconds)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _be_rank(
    work: Callable[[], int], environment: Mapping[str, str] | None, launched: dict[str, str]
) -> None:
    code = 1
    try:
        if environment is not None:
            os.environ.clear()
            os.environ |= environment
        os.environ |= launched
        code = work()
    except BaseException:  # noqa: BLE001  the process ends with it
        traceback.print_exc()
    finally:
        os._exit(code)
