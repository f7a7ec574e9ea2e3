"""Runs a function on several ranks through the real `deepspeed` launcher, for tests of this project and of
its users.

Owns the launch: a free port, a time limit, an end for every process, results that come back whole or as an
error. The function runs in fresh processes, joined in one group; it returns something that JSON can hold.
Executing this module is the rank's side.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiprod_ds.errors import EngineError

_TAIL_CHARACTERS = 6000


def run_on_ranks(
    function: Callable[..., Any],
    *,
    ranks: int = 2,
    arguments: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Returns what `function(**arguments)` returns on each of `ranks` ranks, in rank order: on the CPU by
    default.

    Args:
        function: Defined at the top level of an importable module or of a file that can be executed on its
            own.
        ranks: Processes; they form a group before the call and leave it together after it.
        arguments: Keyword arguments that JSON can hold.
        timeout_seconds: Everything is killed after this time. The first run with offload compiles for about a
            minute.
        environment: Added to this process's environment; `DS_ACCELERATOR=cuda` for ranks on GPUs.

    Raises:
        EngineError: If a rank fails, time runs out or a result is missing; the message ends with the ranks'
            output.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        call = {"target": _target(function), "arguments": dict(arguments or {}), "results": folder}
        command = [*launcher_command(ranks=ranks), "--module", "aiprod_ds.testing.dist", json.dumps(call)]
        # The environment's own ninja first: two versions hash commands differently and rebuild DeepSpeed's op
        # in turns.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        base = {
            **os.environ,
            "PATH": path,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        code, output = run_in_own_session(
            command, timeout_seconds=timeout_seconds, environment={**base, **(environment or {})}
        )
        results = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        # The launcher exits with 0 when it is killed itself, so only a file from every rank means success.
        missing = [rank for rank, path in enumerate(results) if not path.exists()]
        if code != 0 or missing:
            reason = "ran out of time" if code is None else f"exited with {code}"
            raise EngineError(
                f"{call['target']}: must finish on {ranks} ranks, got a launcher that {reason} and no "
                f"result of ranks {missing}."
                f" Read the output:\n{output[-_TAIL_CHARACTERS:]}"
            )
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def launcher_command(*, ranks: int) -> list[str]:
    """Returns the command that starts `ranks` processes on this machine; what they execute is to be added to
    it."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,
        "--num_accelerators",
        str(ranks),
    ]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank"]


def run_in_own_session(
    command: list[str], *, timeout_seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    """Runs a command in a session of its own and leaves none of its processes behind.

    Returns:
        The exit code, None after the time limit, and the output of all its processes.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_session(process.pid)
            process.wait()
        output.seek(0)
        return code, output.read()


def kill_session(leader: int) -> None:
    """Kills every process of the group that `leader` leads; the launcher leaves its workers behind when it
    dies itself."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """Returns a TCP port on this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _target(function: Callable[..., Any]) -> str:
    source = inspect.getsourcefile(function)
    if source is None or "." in function.__qualname__:
        raise EngineError(
            f"function: must be at the top level of a source file, got {function.__qualname__}. Move it "
            "there."
        )
    return f"{Path(source).resolve()}:{function.__name__}"


def _load(target: str) -> Callable[..., Any]:
    path, _, name = target.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _main() -> None:
    dist = importlib.import_module(
        "aiprod_ds.engine.dist"
    )  # torch is loaded in the ranks, not in the process that starts them
    call = json.loads(sys.argv[-1])
    function = _load(call["target"])
    cpuinfo: Any = importlib.import_module(
        "cpuinfo"
    )  # DeepSpeed asks it for every offloaded optimizer, a second each
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    # every engine that closes collects garbage, and all that is imported would be looked through again
    gc.freeze()
    with dist.process_group():
        result = function(**call["arguments"])
        (Path(call["results"]) / f"{dist.rank()}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _main()
