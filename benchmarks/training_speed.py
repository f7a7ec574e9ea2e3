"""How fast does the trainer train on one GPU in the curriculum's phases, beside bare loops of the same work?

Every case is a process of its own; the cases of one command follow each other on one machine. LTX-Video 2B is
diffusers' LTXVideoTransformer3DModel in its default size (1.92 billion parameters, random weights, 128 text
tokens); `--workload` takes its VAE or Oobleck instead.

    trainer             the project's trainer as a user has it: its loop, loader, logging, `performance: auto`
    trainer-uncaptured  the same with `performance.graphs: off`
    trainer-eager       the same with `performance.compile: off`, too
    trainer-recomputed  the same as trainer, blocks recomputed in the backward pass
    trainer-fp8         the same as trainer with `performance.fp8: tensorwise`; -rowwise with `rowwise`
    plain               PyTorch: compiled blocks, fused AdamW on bf16 weights, no fp32 masters, no clipping
    flat                compiled blocks, flat bf16 weights and gradients, fp32 masters, clipping and AdamW as
                        one compiled pass
    captured            the same as one CUDA graph
    deepspeed           DeepSpeed without the trainer, one parameter after another: compiled blocks, fp32
                        masters, clipping
    accelerate          `Accelerator.prepare`, bf16, fp32 weights, compiled blocks, clipping

    python benchmarks/training_speed.py --output benchmarks/results/NAME.json

Those of `_USUAL` take part unless `--cases` names others. Before a case is timed, the gradients of all
parameters are compared with plain eager autograd of the same batch in the same type, those of fp8 with bf16's
(`gradient_check.py`); the command ends with the parameter's name if one differs by more than the tolerance,
and writes nothing of that case. The runs of a figure are stretches of updates after a warm-up, with the
device awaited at their edges only. `host time` is how long the host takes to issue an update that begins on
an idle device; where a loop waits for the device inside of an update, that is in it. TFLOP/s are credited by
`Family.flops_per_update`, 6 N B S + 12 L B S^2 D, recomputing not counted; a VAE has no such convention and
gets none. MFU is that over the data sheet's figure, and over a bf16 matrix product of 8192 that the processes
of the command measured. The rows of updates per second are compared with the fastest bare loop of the command
that keeps fp32 masters.

`--tiny` runs small models in fp32 on any machine, to see that the script works; graphs are skipped there. It
does not show: several GPUs, reading from disk, text masks, the quality of what is learned, checkpoints, or
how far two machines of one kind differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bare_loops import LOOPS
from result_file import figure, write_result
from side_by_side import measure_bare, measure_trainer
from trainer_runs import run_in_own_process
from update_timer import Length, UpdateTimer, synchronize
from workload import Choices, Workload
from workloads import TINY_WORKLOADS, WORKLOADS

from aiprod_ds.engine import dist
from aiprod_ds.train.planning.auto import this_machine

_TRAINERS: dict[str, dict[str, Any]] = {
    "trainer": {},
    "trainer-uncaptured": {"graphs": "off"},
    "trainer-eager": {"compile": "off", "graphs": "off"},
    "trainer-recomputed": {},
    "trainer-fp8": {"fp8": "tensorwise"},
    "trainer-fp8-rowwise": {"fp8": "rowwise"},
}
_CASES = (*_TRAINERS, *LOOPS)
_USUAL = ("trainer", "trainer-eager", "plain", "flat", "captured", "deepspeed")
_WITH_MASTERS = ("captured", "flat", "deepspeed", "accelerate")
_LENGTHS = {
    "low": Length(warm_up=10, runs=3, updates=8),
    "medium": Length(warm_up=10, runs=3, updates=8),
    "high": Length(warm_up=4, runs=3, updates=3),
}
_TINY_LENGTH = Length(warm_up=2, runs=2, updates=2, alone=1)
_GOALS = {"low": 400.0, "medium": 530.0, "high": 530.0}
_MATMUL = 8192


def main() -> None:
    """Measures every case in turn and writes one result file, anew after each case."""
    arguments = _arguments()
    if arguments.measure:
        arguments.output.write_text(json.dumps(_measure(arguments)))
        return
    device = dist.choose_device()
    options = [f"--workload={arguments.workload}", f"--zero-stage={arguments.zero_stage}"]
    options += [] if arguments.lora is None else [f"--lora={arguments.lora}"]
    options += ["--tiny"] if arguments.tiny else []
    measured: dict[str, dict[str, Any]] = {}
    for case in arguments.cases:
        if case == "captured" and device.type == "cpu":
            print("captured: skipped, a CUDA graph needs a GPU", flush=True)
            continue
        measured[case] = run_in_own_process(__file__, case, *options, "--phases", *arguments.phases)
        for phase, found in measured[case]["phases"].items():
            print(
                f"{phase}, {case}: {1000 * statistics.median(found['seconds']):.1f} ms, gradients differ by "
                f"{found['all_gradients']:.2g}, the worst by {found['worst_gradient']:.2g}: "
                f"{found['worst_name']}",
                flush=True,
            )
        write_result(arguments.output, "training_speed", _rows(measured, arguments), is_told=False)
    print(_table(_rows(measured, arguments)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of the trainer beside bare loops of the same work.")
    parser.add_argument("--cases", nargs="+", choices=_CASES, default=list(_USUAL), metavar="CASE")
    parser.add_argument("--phases", nargs="+", choices=_LENGTHS, help="all that the workload has by default")
    parser.add_argument("--workload", choices=WORKLOADS, default="ltx")
    parser.add_argument(
        "--zero-stage", type=int, choices=range(4), default=1, help="of the trainer and of bare DeepSpeed"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters in place of all weights")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)  # the side of one case's process
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    shapes = _workload(arguments).shapes
    arguments.phases = [phase for phase in arguments.phases or shapes if phase in shapes]
    if not arguments.phases:
        parser.error(f"--phases: {arguments.workload} has {', '.join(shapes)}")
    return arguments


def _workload(arguments: argparse.Namespace) -> Workload:
    return (TINY_WORKLOADS if arguments.tiny else WORKLOADS)[arguments.workload]


def _choices(arguments: argparse.Namespace, case: str) -> Choices:
    return Choices(
        precision="fp32" if arguments.tiny else "bf16",
        zero_stage=arguments.zero_stage,
        lora_rank=arguments.lora,
        workers=0 if arguments.tiny else 2,
        recomputes=case == "trainer-recomputed",
    )


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    case, workload = arguments.measure, _workload(arguments)
    choices = _choices(arguments, case)
    phases = {}
    with dist.process_group() as device:
        for phase in arguments.phases:
            length = _TINY_LENGTH if arguments.tiny else _LENGTHS[phase]
            common: dict[str, Any] = {"device": device, "choices": choices, "length": length}
            shape = workload.shapes[phase]
            if case in _TRAINERS:
                found = measure_trainer(case, workload, shape, performance=_TRAINERS[case], **common)
            else:
                backend = "inductor" if device.type == "cuda" else "aot_eager"
                found = measure_bare(case, workload, shape, backend=backend, **common)
            phases[phase] = found.to_dict()
        machine = this_machine()
        return {
            "phases": phases,
            "matmul_flops": _matmul_flops(device),
            "peak_flops": None if machine is None else machine.half_flops,
        }


def _matmul_flops(device: torch.device) -> float:
    """Returns how many operations a second a large matrix product of random numbers reaches."""
    size, dtype = (_MATMUL, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = UpdateTimer(Length(warm_up=10, runs=3, updates=10, alone=0))
    synchronize()
    is_last = False
    while not is_last:
        torch.mm(left, right)
        is_last = timer.after_update()
    return 2.0 * size**3 / statistics.median(timer.seconds)


def _rows(measured: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    matmul = [found["matmul_flops"] for found in measured.values()]
    peak = next(iter(measured.values()))["peak_flops"]
    rows = [figure(f"matrix product of {_MATMUL}", "speed", "TFLOP/s", [flops / 1e12 for flops in matmul])]
    ceilings = {"measured matrix product": statistics.median(matmul), "data sheet": peak}
    for phase in arguments.phases:
        for case, found in measured.items():
            rows += _case_rows(phase, case, found["phases"][phase], ceilings, arguments)
    return _with_peers(rows, arguments.phases)


def _case_rows(
    phase: str,
    case: str,
    found: dict[str, Any],
    ceilings: dict[str, float | None],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    workload, name = _workload(arguments), f"{phase}, {case}"
    shape, choices = workload.shapes[phase], _choices(arguments, case)
    seconds, tokens = found["seconds"], workload.num_tokens(shape)
    flops = workload.flops_per_update(shape, choices)

    def row(metric: str, unit: str, values: list[float], **more: Any) -> dict[str, Any]:
        return figure(name, metric, unit, values, **more)

    rows = [
        row("time of an update", "ms", [1000 * each for each in seconds]),
        row("updates per second", "1/s", [1 / each for each in seconds]),
        row("samples per second", "clips/s", [shape.batch / each for each in seconds]),
    ]
    if tokens is not None:
        rows.append(row("tokens per second", "1/s", [shape.batch * tokens / each for each in seconds]))
    if flops is not None:
        goal = _GOALS[phase] if case == "trainer" and not arguments.tiny else None
        rows.append(row("credited speed", "TFLOP/s", [flops / each / 1e12 for each in seconds], goal=goal))
        rows += [
            row(f"MFU, {ceiling}", "%", [100 * flops / each / known for each in seconds])
            for ceiling, known in ceilings.items()
            if known is not None
        ]
    rows += [
        row("peak device memory", "GB", [found["peak_bytes"] / 1e9]),
        row("host time of an update", "ms", [1000 * each for each in found["host_seconds"]]),
        row("first update", "s", [found["first_seconds"]]),
        row("largest difference of a gradient", "1", [found["worst_gradient"]]),
        row("difference of all gradients", "1", [found["all_gradients"]]),
    ]
    if found["waited_share"] is not None:
        rows.append(row("waiting for data", "%", [100 * found["waited_share"]]))
    return rows


def _with_peers(rows: list[dict[str, Any]], phases: list[str]) -> list[dict[str, Any]]:
    """Puts the fastest bare loop with masters beside the updates per second of every other case."""
    known = {row["case"]: row["value"] for row in rows if row["metric"] == "updates per second"}
    for phase in phases:
        bare = {case: known[f"{phase}, {case}"] for case in _WITH_MASTERS if f"{phase}, {case}" in known}
        if not bare:
            continue
        best = max(bare, key=lambda case: bare[case])
        for row in rows:
            own_phase, _, case = row["case"].partition(", ")
            if row["metric"] == "updates per second" and own_phase == phase and case != best:
                row |= {
                    "peer": f"{best}, which is {bare[best] / row['value']:.2f} times as fast",
                    "peer_value": bare[best],
                }
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    """Returns the figures that matter, a line a case."""
    shown = (
        "time of an update",
        "credited speed",
        "MFU, data sheet",
        "peak device memory",
        "host time of an update",
    )
    cases: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["metric"] in shown:
            cases.setdefault(row["case"], {})[row["metric"]] = f"{row['value']:.4g} {row['unit']}"
    return "\n".join(
        "  ".join([f"{case:28}", *(f"{values.get(metric, '-'):>14}" for metric in shown)])
        for case, values in cases.items()
    )


if __name__ == "__main__":
    main()
