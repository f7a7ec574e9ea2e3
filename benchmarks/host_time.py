"""How much time of the host does an update take through the trainer, beside bare loops of the same module?

LTX-Video with all its 28 blocks and 715 parameters, but so narrow that computing costs next to nothing: what
is left is Python, torch's dispatch and the optimizer's calls, which on a GPU decide the speed of the smallest
phase. No GPU is needed or used. Weights are bf16, all sides compile the blocks, one thread computes.

    bare                   plain PyTorch: fused AdamW on bf16 weights, no fp32 masters, no clipping
    bare, flat             flat weights, gradients and fp32 masters, clipping and AdamW as one compiled pass
    bare DeepSpeed         ZeRO-1 over 715 parameters without the trainer, fp32 masters, clipping
    trainer, local engine  the trainer's loop, loader and logging over its engine in plain PyTorch
    trainer                the same over DeepSpeed ZeRO-1

    python benchmarks/host_time.py --output runs/host_time.json        (or: make benchmark-host)

All sides run in one process, in turn, round after round; the first round compiles, which takes minutes once.
Figures are CPU time of the process, which other programs on the machine disturb less than wall time; that
stands beside it. Gradients are compared with plain autograd first, as in `training_speed.py`. `--profile`
also prints where the trainer's updates spend their CPU time, by cProfile.

It is a benchmark and no test: ratios can be compared between machines, times cannot. It does not show: the
device's share, several ranks, reading from disk, or what the loader's worker does in a process of its own.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result
from side_by_side import Measured, measure_bare, measure_trainer
from update_timer import Length
from workload import Choices
from workloads import NARROW, TINY_WORKLOADS

from aiprod_ds.engine import dist

_BUILT_IN = "built-in"
_GOAL = 1.2
_SHOWN, _PACKAGES = 25, 8
_BASE = "bare"
_LOOPS = {"bare": "plain", "bare, flat": "flat", "bare DeepSpeed": "deepspeed"}
_ENGINES = {"trainer, local engine": "local", "trainer": "deepspeed"}

Measure = Callable[..., Measured]


def main() -> None:
    """Measures all sides in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Host time of an update: the trainer beside bare loops.")
    parser.add_argument("--updates", type=int, default=20, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", choices=("blocks", "off"), default="blocks")
    parser.add_argument("--cases", nargs="+", choices=(*_LOOPS, *_ENGINES), metavar="CASE")
    parser.add_argument("--profile", action="store_true", help="print where the trainer's updates spend time")
    parser.add_argument("--tiny", action="store_true", help="two blocks, to see that the script works")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(dict.fromkeys([_BASE, *(arguments.cases or (*_LOOPS, *_ENGINES))]))
    measured: dict[str, list[Measured]] = {case: [] for case in cases}
    with dist.process_group() as device:
        if device.type != "cpu":
            parser.error("must run on the CPU. Set DS_ACCELERATOR=cpu.")
        measure = _measure(arguments, device)
        for number in range(arguments.rounds):
            for case in cases:
                measured[case].append(measure(case))
                print(f"round {number + 1}, {case}: {_milliseconds(measured[case][-1]):.1f} ms", flush=True)
        if arguments.profile:
            for case in cases:
                if case in _ENGINES:
                    profiler = cProfile.Profile(time.process_time)
                    measure(case, profiler)
                    print(_profile_table(profiler, arguments.updates, title=case))
    write_result(arguments.output, "host_time", _rows(measured))


def _measure(arguments: argparse.Namespace, device: torch.device) -> Measure:
    workload = TINY_WORKLOADS["ltx"] if arguments.tiny else NARROW
    shape = workload.shapes["low"]
    choices = Choices(compiles=arguments.compile == "blocks", workers=1)
    length = Length(warm_up=3, runs=1, updates=arguments.updates, alone=0)

    def measure(case: str, profiler: cProfile.Profile | None = None) -> Measured:
        if case in _LOOPS:
            return measure_bare(
                _LOOPS[case], workload, shape, device, choices, length=length, backend="inductor"
            )
        chosen = replace(choices, engine=_ENGINES[case])
        performance = {"compile": arguments.compile}
        return measure_trainer(
            case,
            workload,
            shape,
            device,
            chosen,
            length=length,
            performance=performance,
            profiler=profiler,
        )

    return measure


def _milliseconds(found: Measured) -> float:
    return 1000 * statistics.median(found.cpu_seconds)


def _rows(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    base = [_milliseconds(found) for found in measured[_BASE]]
    rows = []
    for case, rounds in measured.items():
        own = [_milliseconds(found) for found in rounds]
        rows.append(figure(case, "CPU time of an update", "ms", own))
        wall = [1000 * statistics.median(found.seconds) for found in rounds]
        rows.append(figure(case, "wall time of an update", "ms", wall))
        if case != _BASE:
            ratios = [mine / others for mine, others in zip(own, base, strict=True)]
            goal = _GOAL if case in _ENGINES else None
            rows.append(figure(case, f"CPU time over {_BASE}", "times", ratios, goal=goal))
        worst = max(found.worst_gradient for found in rounds)
        rows.append(figure(case, "largest difference of a gradient", "1", [worst]))
    return rows


def _profile_table(profiler: cProfile.Profile, num_updates: int, *, title: str) -> str:
    """Returns where updates spent their time: by package, by function, and by function of the package
    itself."""
    stats: Any = pstats.Stats(profiler)
    entries = [_Entry.of(place, values, num_updates) for place, values in stats.stats.items()]
    packages: dict[str, float] = {}
    for entry in entries:
        for package, own in entry.own_by_package.items():
            packages[package] = packages.get(package, 0.0) + own
    largest = sorted(packages.items(), key=lambda item: -item[1])[:_PACKAGES]
    functions = sorted(entries, key=lambda entry: -entry.own)
    own_functions = [entry for entry in functions if entry.package == "aiprod_ds"]
    return "\n".join(
        [
            f"{title}: CPU time in ms and calls, an update, with what cProfile itself takes",
            "by package, built-in functions counted with their callers:",
            *(f"{own:9.3f}  {package}" for package, own in largest),
            f"{'own':>9}{'with calls':>12}{'calls':>9}  function",
            *map(str, functions[:_SHOWN]),
            f"{'own':>9}{'with calls':>12}{'calls':>9}  function of aiprod_ds",
            *map(str, own_functions[:_SHOWN]),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A function, in milliseconds and calls an update."""

    name: str
    package: str
    own: float
    cumulative: float
    calls: float
    own_by_package: dict[str, float]

    @classmethod
    def of(cls, place: tuple[str, int, str], values: tuple[Any, ...], num_updates: int) -> _Entry:
        """Returns what pstats has of one function."""
        file, line, function = place
        _, calls, own, cumulative, callers = values
        package, scale = _package(file), 1000 / num_updates
        if package == _BUILT_IN:
            parts: dict[str, float] = {}
            for (caller, _, _), (_, _, theirs, _) in callers.items():
                parts[_package(caller)] = parts.get(_package(caller), 0.0) + theirs * scale
        else:
            parts = {package: own * scale}
        where = f"{'/'.join(Path(file).parts[-3:])}:{line} " if package != _BUILT_IN else ""
        return cls(
            name=f"{where}{function}",
            package=package,
            own=own * scale,
            cumulative=cumulative * scale,
            calls=calls / num_updates,
            own_by_package=parts,
        )

    def __str__(self) -> str:
        return f"{self.own:9.3f}{self.cumulative:12.3f}{self.calls:9.1f}  {self.name}"


def _package(file: str) -> str:
    """Returns the name of the package that a file is in."""
    parts = Path(file).parts
    if file == "~":
        return _BUILT_IN
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return next((name for name in ("aiprod_ds", "benchmarks") if name in parts), "python")


if __name__ == "__main__":
    main()
