"""What does it cost to compare the bits of what every rank holds, beside the updates themselves?

Two ranks train transformer layers, half of them frozen, at ZeRO-0, so that all weights are on every rank: the
most that there can be to compare. Timed are updates without the comparison, and then the comparison alone, as
it comes after every update: over whole rounds, with what is sent and read. Figures are CPU time of a process,
all its threads together, which other programs disturb less than wall time.

    python benchmarks/replica_check.py --output benchmarks/results/NAME.json

`DS_ACCELERATOR=cuda`, `--width 2048 --layers 28 --precision bf16` are for GPUs. There it is wall time with
nothing else on the device, so that the comparison counts in full, though it runs beside other work.

It does not show: several hosts, whose links carry 160 bytes every tenth update, or models whose updates are
much shorter than a tenth of a second, of which Python's part of the comparison is more.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import deepspeed_engine
from aiprod_ds.train.replicas.check import ReplicaCheck
from aiprod_ds.train.state import TrainState

_GOAL_PERCENT = 0.1
_ROUNDS_ALONE = 5  # of all turns, for one figure


def main() -> None:
    """Measures both on two ranks and writes one result file."""
    from result_file import figure, write_result  # the ranks, which load this file, do not find it

    parser = argparse.ArgumentParser(description="The cost of comparing ranks beside updates.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5, help="of each run")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of each of 4 samples")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    given = {key: value for key, value in vars(arguments).items() if key != "output"}
    accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
    environment = {"DS_ACCELERATOR": accelerator} if accelerator != "cpu" else None
    main_rank = run_on_ranks(measure, arguments=given, environment=environment, timeout_seconds=1500)[0]
    millions = main_rank["parameters"] / 1e6
    case = f"{millions:.0f} M parameters, {arguments.precision}, on {accelerator}"
    rows = [
        figure(case, "update", "ms", main_rank["update"]),
        figure(case, "comparison after each update", "ms", main_rank["look"]),
        figure(case, "share of an update", "%", main_rank["share"], goal=_GOAL_PERCENT),
        figure(case, "comparison of everything before a save", "ms", main_rank["all"]),
    ]
    write_result(arguments.output, "replica_check", rows)


def measure(runs: int, updates: int, width: int, layers: int, tokens: int, precision: str) -> dict[str, Any]:
    """Returns milliseconds of both, of each run, on this rank."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    if precision != "fp32":
        values[precision] = {"enabled": True}
    model = nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
    )
    for layer in list(model)[: layers // 2]:
        layer.requires_grad_(False)
    found: dict[str, Any] = {"update": [], "look": [], "share": [], "all": []}
    with deepspeed_engine(
        model,
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings(values, "benchmark"),
        micro_batch_size=4,
    ) as engine:
        engine.set_learning_rate(1e-4)
        inputs = torch.randn(4, tokens, width, device=engine.device, dtype=engine.compute_dtype)
        state, check = TrainState(engine=engine), ReplicaCheck(is_on=True)
        check.begin(state)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        update = _update_of(engine, inputs)
        looks = _ROUNDS_ALONE * check.num_turns
        for index in range(runs + 1):  # the first warms up
            update_ms = _milliseconds(update, updates)
            look_ms = _milliseconds(check.look, looks)
            all_ms = _milliseconds(lambda: check.look_at_all(state), 3)
            if index:
                found["update"].append(update_ms)
                found["look"].append(look_ms)
                found["share"].append(100 * look_ms / update_ms)
                found["all"].append(all_ms)
    return found


def _update_of(engine: Any, inputs: Tensor) -> Callable[[], None]:
    def update() -> None:
        engine.backward(engine(inputs).float().square().mean())
        engine.step()

    return update


def _milliseconds(work: Callable[[], Any], times: int) -> float:
    """Returns the CPU time of a call; on a GPU the wall time between two idle moments of the device."""
    is_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    clock = time.perf_counter if is_gpu else time.process_time
    if is_gpu:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(times):
        work()
    if is_gpu:
        torch.cuda.synchronize()
    return 1000 * (clock() - began) / times


if __name__ == "__main__":
    main()
