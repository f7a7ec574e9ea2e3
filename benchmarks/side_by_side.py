"""One case of a comparison, measured: the trainer or a bare loop, on one shape, with its gradients checked.

Owns the order: the oracle's gradients, the loop, its first update, the comparison, the timing. It is the same
for both sides, and no time is returned if the gradients differ. Called by `training_speed.py` and
`host_time.py`, inside `dist.process_group`.
"""

from __future__ import annotations

import cProfile
import gc
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bare_loops import BETAS, LOOPS, attention, new_job
from gradient_check import CLIP_NORM, Worst, bare_oracle, engine_moments, trainer_oracle
from trainer_runs import timed_training
from update_timer import Length, UpdateTimer, synchronize
from workload import Choices, Shape, Workload

from aiprod_ds.engine.protocol import Engine
from aiprod_ds.report.environment import device_peak_bytes, reset_device_peak
from aiprod_ds.trainers.base import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one case costs on one shape.

    Attributes:
        seconds: Of wall time per update, of each run.
        cpu_seconds: The same of the process's CPU time.
        host_seconds: Until the host has issued an update that begins on an idle device.
        first_seconds: Of the first update: compiling, capturing, warming up.
        waited_share: Of the time, for the loader; None without one.
        peak_bytes: Highest memory of tensors on the device.
        worst_gradient: Largest relative difference from plain autograd's.
        worst_name: Of the parameter that has it.
        all_gradients: Relative difference of all together.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    host_seconds: list[float]
    first_seconds: float
    waited_share: float | None
    peak_bytes: int
    worst_gradient: float
    worst_name: str
    all_gradients: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return asdict(self)


def measure_bare(
    case: str,
    workload: Workload,
    shape: Shape,
    device: torch.device,
    choices: Choices,
    *,
    length: Length,
    backend: str,
) -> Measured:
    """Returns what a bare loop costs.

    Raises:
        SystemExit: If it computes other gradients than plain autograd.
    """
    _clean()
    oracle = bare_oracle(workload, shape, str(device), choices)
    _clean()
    with attention(device):
        loop = LOOPS[case](new_job(workload, shape, device, choices, backend=backend))
        reset_device_peak()
        synchronize()
        began = time.perf_counter()
        loop.update()
        synchronize()
        first_seconds, peak = time.perf_counter() - began, device_peak_bytes()
        worst = oracle.compare(loop.moments(), beta1=BETAS[0], is_clipped=loop.is_clipped, case=case)
        _clean()
        timer = UpdateTimer(length)
        is_last = timer.after_update()
        while not is_last:
            loop.update()
            is_last = timer.after_update()
    peak = max(peak, device_peak_bytes())
    measured = _measured(timer, first_seconds=first_seconds, waited_share=None, peak=peak, worst=worst)
    loop.close()
    return measured


def measure_trainer(
    case: str,
    workload: Workload,
    shape: Shape,
    device: torch.device,
    choices: Choices,
    *,
    length: Length,
    performance: dict[str, Any],
    profiler: cProfile.Profile | None = None,
) -> Measured:
    """Returns what training through the trainer costs: its loop, loader, logging and engine.

    Args:
        case: For messages.
        workload: Whose trainer.
        shape: Of the phase.
        device: Of the process.
        choices: As for the bare loops.
        length: Of the measurement.
        performance: That section of its configuration.
        profiler: Looks at the timed updates.

    Raises:
        SystemExit: If it computes other gradients than plain autograd.
    """
    _clean()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        made = _Trainers(workload, shape, device, performance)
        oracle = trainer_oracle(made.new(runs / "oracle", replace(choices, workers=0)), choices, device)
        if performance.get("fp8", "off") != "off":
            oracle = replace(oracle, precision="fp8")
        _clean()
        trainer = made.new(runs / "run", choices)
        first: list[tuple[int, Worst]] = []

        def after_first(engine: Engine) -> None:
            peak, clip = device_peak_bytes(), trainer.config.optimizer.gradient_clip_norm
            assert clip == CLIP_NORM, "the bare loops clip at this norm"
            beta1 = trainer.config.optimizer.betas[0]
            worst = oracle.compare(engine_moments(engine), beta1=beta1, is_clipped=True, case=case)
            first.append((peak, worst))
            _clean()

        timer = UpdateTimer(length, profiler)
        found = timed_training(trainer, timer, after_first=after_first)
    peak, worst = first[0]
    return _measured(
        timer,
        first_seconds=found["first_seconds"],
        waited_share=found["waited_seconds"] / (sum(timer.seconds) * length.updates),
        peak=max(peak, device_peak_bytes()),
        worst=worst,
    )


@dataclass(frozen=True, slots=True)
class _Trainers:
    workload: Workload
    shape: Shape
    device: torch.device
    performance: dict[str, Any]

    def new(self, folder: Path, choices: Choices) -> Trainer[Any]:
        """Returns a trainer with a model of its own, whose weights are the same each time."""
        model = self.workload.model(str(self.device))
        return self.workload.trainer_of(
            self.shape, folder, choices, model=model, performance=self.performance
        )


def _measured(
    timer: UpdateTimer, *, first_seconds: float, waited_share: float | None, peak: int, worst: Worst
) -> Measured:
    return Measured(
        seconds=timer.seconds,
        cpu_seconds=timer.cpu_seconds,
        host_seconds=timer.host_seconds,
        first_seconds=first_seconds,
        waited_share=waited_share,
        peak_bytes=peak,
        worst_gradient=worst.error,
        worst_name=worst.name,
        all_gradients=worst.error_of_all,
    )


def _clean() -> None:
    """Frees what nobody holds, so that the next peak is that of what follows."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    reset_device_peak()
