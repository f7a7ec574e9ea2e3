"""A rank's side of `scaling.py`: does one piece of work after another and tells of each, as rank 0.

Owns what a case is: the trainer through its own `train`, or a bare loop. All ranks stop at the same update,
because each counts its own. Nothing is compared here.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bare_loops import BareLoop, DeepSpeedLoop, attention, new_job
from fsdp2_loop import Fsdp2Loop
from own_ranks import LINES
from trainer_runs import timed_training
from update_timer import Length, UpdateTimer, synchronize
from workload import Choices, Shape, Workload

from aiprod_ds.engine import dist
from aiprod_ds.report.environment import device_peak_bytes, reset_device_peak

CASES = ("trainer", "deepspeed", "fsdp2")
_LENGTHS = {
    "low": Length(warm_up=6, runs=2, updates=6, alone=0),
    "medium": Length(warm_up=6, runs=2, updates=6, alone=0),
    "high": Length(warm_up=6, runs=2, updates=2, alone=0),
}
_TINY_LENGTH = Length(warm_up=2, runs=2, updates=2, alone=0)
_PARTITIONED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One figure, on as many ranks as there are.

    Attributes:
        case: One of `CASES`.
        stage: Of ZeRO; of FSDP2 what comes next to it.
        phase: Of the workload.
        batch: Clips on a GPU.
    """

    case: str
    stage: int
    phase: str
    batch: int


def measure_on_this_rank(
    works: Sequence[Work], workload: Workload, folder: Path, *, is_tiny: bool, graphs: str
) -> None:
    """Does all `works`, together with the other ranks that the environment tells of.

    Rank 0 appends a line to `LINES` for each: `seconds` per update of each run, `first_seconds` of the first
    update, `peak_bytes` of the rank that has the most, `flops` credited for an update of one GPU or None, and
    `first_loss` and `first_norm` of the trainer.
    """
    with dist.process_group() as device:
        for index, work in enumerate(works):
            _clean()
            shape = replace(workload.shapes[work.phase], batch=work.batch)
            choices = Choices(
                precision="fp32" if is_tiny else "bf16",
                zero_stage=work.stage,
                workers=0 if is_tiny else 2,
            )
            timer = UpdateTimer(_TINY_LENGTH if is_tiny else _LENGTHS[work.phase])
            if work.case == "trainer":
                performance = {"graphs": "auto" if work.stage == _PARTITIONED else graphs}
                run_folder = folder / f"run_{index}"
                found = _train(workload, shape, device, choices, timer, run_folder, performance)
            else:
                found = _loop(work, workload, shape, device, choices, timer)
            found["peak_bytes"] = max(dist.gather_objects(device_peak_bytes()))
            found["flops"] = workload.flops_per_update(shape, choices)
            if dist.is_main():
                with (folder / LINES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"seconds": timer.seconds, **found}) + "\n")


def _train(
    workload: Workload,
    shape: Shape,
    device: torch.device,
    choices: Choices,
    timer: UpdateTimer,
    folder: Path,
    performance: dict[str, Any],
) -> dict[str, Any]:
    all_clips = replace(shape, batch=shape.batch * dist.world_size())
    model = workload.model(str(device))
    trainer = workload.trainer_of(all_clips, folder, choices, model=model, performance=performance)
    found = timed_training(trainer, timer, after_first=lambda _engine: None)
    loss = dist.reduce_mean(torch.tensor(found["first_loss"], device=device))
    return {
        "first_seconds": found["first_seconds"],
        "first_loss": float(loss),
        "first_norm": found["first_norm"],
    }


def _loop(
    work: Work,
    workload: Workload,
    shape: Shape,
    device: torch.device,
    choices: Choices,
    timer: UpdateTimer,
) -> dict[str, Any]:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    if work.case == "fsdp2" or work.stage == _PARTITIONED:
        choices = replace(choices, compiles=False)  # FSDP2's loop compiles; DeepSpeed's stage 3 cannot
    made: Callable[..., BareLoop] = DeepSpeedLoop
    if work.case == "fsdp2":
        made = functools.partial(Fsdp2Loop, keeps_weights=work.stage != _PARTITIONED)
    with attention(device):
        loop = made(new_job(workload, shape, device, choices, backend=backend))
        synchronize()
        began = time.perf_counter()
        loop.update()
        synchronize()
        first_seconds = time.perf_counter() - began
        is_last = timer.after_update()
        while not is_last:
            loop.update()
            is_last = timer.after_update()
    loop.close()
    return {"first_seconds": first_seconds, "first_loss": None, "first_norm": None}


def _clean() -> None:
    """Frees what the work before has left, memory and compiled forms, of which torch keeps only a few."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    reset_device_peak()
