"""How much of one GPU's speed is left on several, by ZeRO stage, beside DeepSpeed and FSDP2 alone?

LTX-Video 2B in the curriculum's three phases (as in `training_speed.py`), or its VAE, on 1, 2, 4, 8 GPUs of
one machine: as many as there are. Every figure is of ranks of its own, one process a GPU.

    trainer      the project's trainer as a user has it: its loop, loader, logging, flat parameters
    deepspeed    DeepSpeed without the trainer, one parameter after another: compiled blocks, fp32 masters,
                 clipping; at stage 3 not compiled, because its function for linear layers loses gradients
    fsdp2        torch's `fully_shard`, a group a block: compiled blocks, fp32 masters, fused AdamW,
                 clipping. Gathered weights stay until the backward pass, which is told as stage 2, or are
                 gathered again: stage 3

    python benchmarks/scaling.py --output benchmarks/results/NAME.json

Batches are per GPU (weak scaling); `--strong` adds runs that keep the batch of all GPUs together. Efficiency
is the speed of a GPU, in % of one GPU alone of the same case and command. One GPU has nothing to partition,
so it runs the first of the stages alone, which stands for all. Communication that is not hidden is the time
that an update takes longer than on one GPU with the same batch per GPU, as a share of it: waiting for slower
ranks and for a host that is busier is in it. TFLOP/s are credited per GPU as in `training_speed.py`. Times
are those of rank 0, memory is that of the rank with the most. Gradients are not compared here; of the trainer
the first update's loss and gradient norm are told, which are those of other clips on more GPUs.

A case that fails tells the end of its output; the command goes on with what is left, and exits with 1.
`--tiny` runs small models in fp32 on CPU ranks, to see that the script works. It does not show: several
hosts, whose links are slower than NVLink, reading from disk, checkpoints, or what is learned.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from own_ranks import run_ranks
from result_file import figure, write_result
from scaling_ranks import CASES, Work, measure_on_this_rank
from workload import Workload
from workloads import TINY_WORKLOADS, WORKLOADS

_COUNTS = (1, 2, 4, 8)
_PARTITIONED = 3
_WEAK_GOALS = {2: {"low": 90.0, "medium": 95.0, "high": 98.0}, 8: {"medium": 95.0, "high": 95.0}}
_STAGE_GOAL = 90.0
_Told = Callable[["Run"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A piece of work and what came of it.

    Attributes:
        gpus: Ranks, each with a GPU of its own.
        found: As `measure_on_this_rank` writes it.
    """

    work: Work
    gpus: int
    found: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Of an update."""
        return statistics.median(self.found["seconds"])

    @property
    def name(self) -> str:
        """As result files have it."""
        work = self.work
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        return f"{work.phase}, {work.case}, ZeRO {work.stage}, {gpus}, {work.batch} clips each"


def main() -> int:
    """Measures every case in turn and writes one result file, anew after each; returns 1 if one failed."""
    arguments = _arguments()
    if arguments.measure is not None:
        works = [Work(**values) for values in json.loads(arguments.measure)]
        measure_on_this_rank(
            works, _workload(arguments), arguments.output, is_tiny=arguments.tiny, graphs=arguments.graphs
        )
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that ranks are ended
    runs: list[Run] = []

    def measured(run: Run) -> None:
        runs.append(run)
        print(_line(run, runs, arguments), flush=True)
        write_result(arguments.output, "scaling", _rows(runs, arguments), is_told=False)

    num_failed = 0
    for case in arguments.cases:
        for gpus in arguments.gpus:
            num_failed += _measure(list(_works(case, gpus, arguments)), gpus, arguments, measured)
    return 1 if num_failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed on several GPUs beside that of one.")
    parser.add_argument("--gpus", nargs="+", type=int, help="all that are present by default, of 1, 2, 4, 8")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--phases", nargs="+", help="all that the workload has by default")
    parser.add_argument("--workload", choices=("ltx", "video-vae"), default="ltx")
    parser.add_argument(
        "--zero-stages", nargs="+", type=int, choices=(1, 2, 3), help="1 2 3; of the VAE 1 by default"
    )
    parser.add_argument("--strong", action="store_true", help="measure strong scaling, too")
    parser.add_argument(
        "--graphs", choices=("auto", "off", "passes"), default="auto", help="of the trainer; at stage 3 auto"
    )
    parser.add_argument(
        "--limit-seconds", type=float, default=300.0, help="for one figure, start and compilation included"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", metavar="WORKS", help=argparse.SUPPRESS)  # the side of a rank
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    present = 2 if arguments.tiny else torch.cuda.device_count()
    if arguments.measure is None and not present:
        parser.error("needs GPUs, got none; --tiny runs on CPU ranks")
    arguments.gpus = sorted(set(arguments.gpus or [count for count in _COUNTS if count <= present]))
    if not arguments.tiny and arguments.gpus[-1] > present and arguments.measure is None:
        parser.error(f"--gpus: {present} are present, got {arguments.gpus[-1]}")
    shapes = _workload(arguments).shapes
    arguments.phases = [phase for phase in arguments.phases or shapes if phase in shapes]
    if not arguments.phases:
        parser.error(f"--phases: {arguments.workload} has {', '.join(shapes)}")
    default = [1, 2, 3] if arguments.workload == "ltx" else [1]
    arguments.zero_stages = sorted(set(arguments.zero_stages or default))
    return arguments


def _workload(arguments: argparse.Namespace) -> Workload:
    return (TINY_WORKLOADS if arguments.tiny else WORKLOADS)[arguments.workload]


def _works(case: str, gpus: int, arguments: argparse.Namespace) -> Iterator[Work]:
    """Yields what ranks of one start do, in order; stage 3 last, because DeepSpeed's leaves traces in its
    process."""
    stages = _stages(case, arguments)
    for stage in stages if gpus > 1 else stages[:1]:
        for phase in arguments.phases:
            whole = _workload(arguments).shapes[phase].batch
            for batch in dict.fromkeys([whole, *_strong_batches(whole, gpus, arguments)]):
                yield Work(case=case, stage=stage, phase=phase, batch=batch)


def _stages(case: str, arguments: argparse.Namespace) -> list[int]:
    if case != "fsdp2":
        stages: list[int] = arguments.zero_stages
        return stages
    return sorted({max(2, stage) for stage in arguments.zero_stages})  # gradients are always sharded


def _strong_batches(whole: int, gpus: int, arguments: argparse.Namespace) -> list[int]:
    """Returns batches per GPU; on one GPU those that it has among others, to see what communication costs."""
    counts = arguments.gpus if gpus == 1 else [gpus]
    return [whole // count for count in counts if arguments.strong and whole % count == 0]


def _measure(works: list[Work], gpus: int, arguments: argparse.Namespace, told: _Told) -> int:
    """Starts ranks for `works`, and again for what is left after a failure; returns how many failed."""
    options = [f"--workload={arguments.workload}", f"--graphs={arguments.graphs}"]
    options += ["--tiny"] if arguments.tiny else []
    num_failed = 0
    while works:
        with tempfile.TemporaryDirectory() as name:
            done: list[Work] = []

            def on_line(found: dict[str, Any], works: list[Work] = works, done: list[Work] = done) -> None:
                done.append(works[len(done)])
                told(Run(work=done[-1], gpus=gpus, found=found))

            wanted = json.dumps([asdict(work) for work in works])
            error = run_ranks(
                [__file__, "--measure", wanted, "--output", name, *options],
                Path(name),
                ranks=gpus,
                seconds_per_line=arguments.limit_seconds,
                on_line=on_line,
            )
        works = works[len(done) :]
        if error is not None and works:
            failed, *works = works
            print(f"{Run(work=failed, gpus=gpus, found={}).name}: failed, {error}", flush=True)
            num_failed += 1
        elif error is not None:
            print(f"{gpus} ranks failed after all was measured: {error}", flush=True)
            num_failed += 1
    return num_failed


def _line(run: Run, runs: list[Run], arguments: argparse.Namespace) -> str:
    told = [f"{row['metric']} {row['value']:.4g} {row['unit']}" for row in _run_rows(run, runs, arguments)]
    return f"{run.name}: {', '.join(told)}"


def _rows(runs: list[Run], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [row for run in runs for row in _run_rows(run, runs, arguments)]


def _run_rows(run: Run, runs: list[Run], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found, seconds, clips = run.found, run.found["seconds"], run.gpus * run.work.batch

    def row(metric: str, unit: str, values: list[float], **more: Any) -> dict[str, Any]:
        return figure(run.name, metric, unit, values, **more)

    rows = [
        row("time of an update", "ms", [1000 * each for each in seconds]),
        row("updates per second", "1/s", [1 / each for each in seconds]) | _peer(run, runs),
        row("samples per second", "clips/s", [clips / each for each in seconds]),
    ]
    if found["flops"] is not None:
        rows.append(
            row("credited speed of a GPU", "TFLOP/s", [found["flops"] / each / 1e12 for each in seconds])
        )
    rows += _beside_one_gpu(run, runs, arguments)
    stage_1 = _of(runs, replace(run.work, stage=1), run.gpus)
    if run.gpus > 1 and run.work.stage == _PARTITIONED and stage_1 is not None:
        goal = _STAGE_GOAL if _has_goals(run, arguments) and run.work.phase != "low" else None
        rows.append(
            row("speed of ZeRO 1", "%", [100 * stage_1.seconds / each for each in seconds], goal=goal)
        )
    rows.append(row("peak device memory", "GB", [found["peak_bytes"] / 1e9]))
    rows.append(row("first update", "s", [found["first_seconds"]]))
    if found["first_loss"] is not None:
        rows.append(row("first loss", "1", [found["first_loss"]]))
        rows.append(row("first gradient norm", "1", [found["first_norm"]]))
    return rows


def _beside_one_gpu(run: Run, runs: list[Run], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    work, seconds = run.work, run.found["seconds"]
    if run.gpus == 1:
        return []
    alone = replace(work, stage=_stages(work.case, arguments)[0])
    same = _of(runs, alone, 1)
    whole = _workload(arguments).shapes[work.phase].batch
    rows = []
    if same is not None and work.batch == whole:
        goal = None
        if _has_goals(run, arguments) and work.stage != _PARTITIONED:
            goal = _WEAK_GOALS.get(run.gpus, {}).get(work.phase)
        values = [100 * same.seconds / each for each in seconds]
        rows.append(figure(run.name, "weak scaling, of one GPU's speed", "%", values, goal=goal))
    in_one = _of(runs, replace(alone, batch=whole), 1)
    if in_one is not None and work.batch * run.gpus == whole:
        values = [100 * in_one.seconds / (run.gpus * each) for each in seconds]
        rows.append(figure(run.name, "strong scaling, of one GPU's speed", "%", values))
    if same is not None:
        values = [100 * (each - same.seconds) / each for each in seconds]
        rows.append(figure(run.name, "communication that is not hidden", "%", values))
    return rows


def _has_goals(run: Run, arguments: argparse.Namespace) -> bool:
    return run.work.case == "trainer" and arguments.workload == "ltx" and not arguments.tiny


def _peer(run: Run, runs: list[Run]) -> dict[str, Any]:
    """Returns the fastest of the others on as many GPUs, beside the trainer: any that takes no more memory
    for weights and gradients by its stage."""
    work = run.work
    others = [
        other
        for other in runs
        if (other.gpus, other.work.phase, other.work.batch) == (run.gpus, work.phase, work.batch)
        and other.work.case != "trainer"
        and (run.gpus == 1 or other.work.stage >= work.stage)
    ]
    if work.case != "trainer" or not others:
        return {}
    best = min(others, key=lambda other: other.seconds)
    ratio = run.seconds / best.seconds
    return {
        "peer": f"{best.work.case}, ZeRO {best.work.stage}, which is {ratio:.2f} times as fast",
        "peer_value": 1 / best.seconds,
    }


def _of(runs: list[Run], work: Work, gpus: int) -> Run | None:
    return next((run for run in runs if run.gpus == gpus and run.work == work), None)


if __name__ == "__main__":
    sys.exit(main())
