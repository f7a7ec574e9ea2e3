"""Runs a function on several ranks, or in a process that forks its own, for tests of this project and of its
users.

Owns the call: what ranks get, a time limit, results that come back whole or as an error. The function runs in
processes of its own, joined in one group; it returns something that JSON can hold.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aiprod_ds.errors import EngineError
from aiprod_ds.testing.fork_server import call_on_forked_ranks
from aiprod_ds.testing.processes import launcher_command, run_in_own_session

_TAIL_CHARACTERS = 6000


def run_on_ranks(
    function: Callable[..., Any],
    *,
    ranks: int = 2,
    arguments: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
    environment: Mapping[str, str] | None = None,
    launcher: bool = False,
) -> list[Any]:
    """Returns what `function(**arguments)` returns on each of `ranks` ranks, in rank order: on the CPU by
    default.

    Ranks are forked from a process that has imported torch, DeepSpeed and the trainers, is started by the
    first call and ends with this process: a call takes about a second in place of ten to twenty. Such ranks
    differ from a run's in two ways. Variables that are read when a process starts or a library is imported
    have the values of the first call, and all ranks order sets of strings alike. Where that matters, or the
    launcher itself, ask for it.

    Args:
        function: Defined at the top level of an importable module or of a file that can be executed on its
            own.
        ranks: Processes; they form a group before the call and leave it together after it.
        arguments: Keyword arguments that JSON can hold.
        timeout_seconds: Everything is killed after this time. The first run with offload compiles for about a
            minute.
        environment: Added to this process's environment, `DS_ACCELERATOR=cuda` for ranks on GPUs. With it the
            launcher is used always.
        launcher: Whether the real `deepspeed` launcher starts the ranks, as it starts a run.

    Raises:
        EngineError: If a rank fails, time runs out or a result is missing; the message ends with the ranks'
            output.
    """
    start = _launch if launcher or environment else _fork
    return _results(
        function,
        arguments or {},
        partial(start, ranks, _environment(environment or {}), timeout_seconds),
        ranks,
    )


def run_forked(
    function: Callable[..., Any],
    *,
    arguments: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
) -> Any:
    """Returns what `function(**arguments)` returns in one process that is no rank and has joined no group.

    It is forked from the process that `run_on_ranks` forks ranks from, so it has imported everything and may
    itself fork ranks (`testing.forked`) that a test stops or kills.

    Args:
        function: As `run_on_ranks` takes it.
        arguments: Keyword arguments that JSON can hold.
        timeout_seconds: It is killed after this time, with what it has forked.

    Raises:
        EngineError: If it fails or time runs out; the message ends with its output.
    """
    return _results(function, arguments or {}, partial(_fork, None, _environment({}), timeout_seconds), 1)[0]


def _results(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    start: Callable[[Mapping[str, Any]], tuple[str | None, str]],
    ranks: int,
) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        call = {"target": _target(function), "arguments": dict(arguments), "results": folder}
        failure, output = start(call)
        results = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        # The launcher exits with 0 when it is killed itself, so only a file from every rank means success.
        missing = [rank for rank, path in enumerate(results) if not path.exists()]
        if failure or missing:
            raise EngineError(
                f"{call['target']}: must finish on {ranks} ranks, got {failure or 'their end'} and no result "
                f"of ranks {missing}. Read the output:\n{output[-_TAIL_CHARACTERS:]}"
            )
        return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _launch(
    ranks: int, environment: Mapping[str, str], timeout_seconds: float, call: Mapping[str, Any]
) -> tuple[str | None, str]:
    """Returns what went wrong and what the ranks and their launcher wrote."""
    command = [*launcher_command(ranks=ranks), "--module", "aiprod_ds.testing.rank", json.dumps(call)]
    code, output = run_in_own_session(command, timeout_seconds=timeout_seconds, environment=environment)
    if code is None:
        return "a launcher that ran out of time", output
    return (f"a launcher that exited with {code}" if code else None), output


def _fork(
    ranks: int | None, environment: Mapping[str, str], timeout_seconds: float, call: Mapping[str, Any]
) -> tuple[str | None, str]:
    """Returns what went wrong and what the ranks wrote."""
    output = Path(call["results"]) / "output.txt"
    output.touch()
    end = call_on_forked_ranks(
        call, ranks=ranks, environment=environment, output=output, timeout_seconds=timeout_seconds
    )
    text = output.read_text(encoding="utf-8", errors="replace")
    if end.is_late:
        return "ranks that ran out of time", text
    return (f"ranks that exited with {list(end.codes)}" if any(end.codes) else None), text


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    # The environment's own ninja first: two versions hash commands differently and rebuild DeepSpeed's op in
    # turns.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    base = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **base, **added}


def _target(function: Callable[..., Any]) -> str:
    source = inspect.getsourcefile(function)
    if source is None or "." in function.__qualname__:
        raise EngineError(
            f"function: must be at the top level of a source file, got {function.__qualname__}. Move it "
            "there."
        )
    return f"{Path(source).resolve()}:{function.__name__}"
