"""The rank's side of `run_on_ranks`: loads a function, calls it inside a process group, writes its result.

The launcher executes this module; a server's forks call `call_on_this_rank`, or `call_alone` if they are no
ranks.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def call_on_this_rank(call: Mapping[str, Any]) -> None:
    """Joins the group that the environment describes, calls `target` with `arguments` and writes the result
    into `results`.

    Args:
        call: `target` as `PATH:FUNCTION`, `arguments`, and the folder `results`, which gets `RANK.json`.
    """
    # torch is loaded in the ranks, not in the process that starts them
    dist = importlib.import_module("aiprod_ds.engine.dist")
    function = _prepared(call)
    with dist.process_group():
        _write_result(call, dist.rank(), function(**call["arguments"]))


def call_alone(call: Mapping[str, Any]) -> None:
    """Does the same in a process that joins no group; its result is that of rank 0."""
    function = _prepared(call)
    _write_result(call, 0, function(**call["arguments"]))


def _prepared(call: Mapping[str, Any]) -> Callable[..., Any]:
    function = _load(call["target"])
    ask_for_the_cpu_once()
    # every engine that closes collects garbage, and all that is imported would be looked through again
    gc.freeze()
    return function


def _write_result(call: Mapping[str, Any], rank: int, result: object) -> None:
    (Path(call["results"]) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def ask_for_the_cpu_once() -> None:
    """Keeps the first answer of `cpuinfo`; DeepSpeed asks it for every offloaded optimizer, a second each."""
    cpuinfo: Any = importlib.import_module("cpuinfo")
    if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


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


if __name__ == "__main__":
    call_on_this_rank(json.loads(sys.argv[-1]))
