"""What a trainer's run needs and costs on a kind of GPU, as it is configured and with the fastest settings
that fit.

Brings the pure estimates of `aiprod_ds.planner` and the workloads together. `plan --machine` shows it;
`auto.py` asks for the choice alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiprod_ds.config.deepspeed import DeepSpeedSettings, read_settings, with_parallel
from aiprod_ds.config.run import PerformanceConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.planner.advice import starving
from aiprod_ds.planner.computing import Computing
from aiprod_ds.planner.cost import BucketCost, Estimator
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.search import ParallelChoice, search
from aiprod_ds.train.performance import Performance, choose_performance
from aiprod_ds.train.planning.gpu_rules import require_runnable
from aiprod_ds.train.planning.recompute import with_recompute
from aiprod_ds.train.planning.trace import Shaped, Workloads

_EVERY = (0, 8, 4, 2, 1)
"""Of how many blocks one is computed again, as `performance.recompute: auto` tries it; each takes a trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The costs of a run.

    Attributes:
        configured: Every bucket of every phase as the configuration says; empty under
            `engine.parallel: auto`.
        choice: The fastest settings that fit; None if nothing does.
        chosen: Every bucket with them.
        computes: What `performance` chooses on that GPU, and why, one line each.
        advice: For each phase whose micro-batches are too small for the GPU, what larger ones would bring.
        problem: Why there is no choice.
    """

    machine: Machine
    world_size: int
    dollars_per_gpu_hour: float
    configured: tuple[BucketCost, ...]
    choice: ParallelChoice | None
    chosen: tuple[BucketCost, ...]
    computes: tuple[str, ...]
    advice: tuple[str, ...] = ()
    problem: str | None = None

    def document(self) -> dict[str, Any]:
        """Returns it JSON-ready."""
        return {
            "machine": self.machine.name,
            "gpus": self.world_size,
            "dollars_per_gpu_hour": self.dollars_per_gpu_hour,
            "configured": [cost.to_dict() for cost in self.configured],
            "choice": None if self.choice is None else self.choice.to_dict(),
            "chosen": [cost.to_dict() for cost in self.chosen],
            "computes": list(self.computes),
            "advice": list(self.advice),
            "problem": self.problem,
        }


def estimate_run(
    trainer: Shaped, plan: RunPlan, machine: Machine, *, dollars_per_gpu_hour: float | None = None
) -> Estimate:
    """Returns what the run needs and costs.

    Args:
        plan: Its phases for the GPUs in question.
        dollars_per_gpu_hour: In place of the machine's.

    Raises:
        ConfigError: If the engine's settings cannot run on that GPU, or `performance` asks for what it has
            not.
    """
    settings = read_settings(trainer.config, source=trainer.source)
    require_runnable(trainer.shapes, settings, machine, where=trainer.source)
    estimator = estimator_of(trainer, plan, machine, settings, dollars_per_gpu_hour=dollars_per_gpu_hour)
    is_auto = trainer.config.engine.parallel == "auto"
    reasons: tuple[str, ...] = ()
    if not is_auto:
        plan, reasons = with_recompute(trainer.config.performance, plan, settings, estimator)
    configured = () if is_auto else tuple(estimator.costs(plan, settings))
    choice, problem = None, None
    try:
        choice = search(estimator, settings_for(settings, where=trainer.source), where=trainer.source)
    except PlanError as error:
        problem = str(error)
    chosen: tuple[BucketCost, ...] = ()
    if choice is not None:
        chosen = tuple(
            estimator.costs(choice.applied(plan), resolved_settings(choice, settings, where=trainer.source))
        )
    performance = performance_of(trainer, plan, machine, settings)
    return Estimate(
        machine=machine,
        world_size=plan.world_size,
        dollars_per_gpu_hour=estimator.dollars_per_gpu_hour,
        configured=configured,
        choice=choice,
        chosen=chosen,
        computes=(*performance.reasons, *reasons),
        advice=tuple(starving(estimator, plan, settings)),
        problem=problem,
    )


def estimator_of(
    trainer: Shaped,
    plan: RunPlan,
    machine: Machine,
    settings: DeepSpeedSettings,
    *,
    dollars_per_gpu_hour: float | None = None,
) -> Estimator:
    """Returns what answers for the trainer's phases."""
    return Estimator(
        plan=plan,
        machine=machine,
        trace=Workloads(trainer, plan, precision=settings.precision).of,
        has_average=trainer.config.ema is not None,
        computing=_computing_of(trainer, plan, machine),
        recompute_levels=_levels(trainer.config.performance),
        dollars_per_gpu_hour=machine.price_per_gpu_hour
        if dollars_per_gpu_hour is None
        else dollars_per_gpu_hour,
    )


def performance_of(
    trainer: Shaped, plan: RunPlan, machine: Machine, settings: DeepSpeedSettings
) -> Performance:
    """Returns what `performance` chooses on the GPU.

    Raises:
        ConfigError: If it asks for what that GPU or these settings do not have.
    """
    unit = trainer.blank_unit(plan)
    return choose_performance(
        trainer.config.performance,
        unit.module,
        capability=machine.compute_capability,
        settings=settings,
        is_flat=trainer.config.engine.flat_parameters != "off",
        can_capture=unit.can_capture,
        where=trainer.source,
    )


def _computing_of(
    trainer: Shaped, plan: RunPlan, machine: Machine
) -> Callable[[DeepSpeedSettings], Computing]:
    found: dict[tuple[int, str], Computing] = {}

    def computing(settings: DeepSpeedSettings) -> Computing:
        key = settings.zero_stage, settings.precision
        if key not in found:
            found[key] = _computing(trainer, plan, machine, settings)
        return found[key]

    return computing


def _computing(trainer: Shaped, plan: RunPlan, machine: Machine, settings: DeepSpeedSettings) -> Computing:
    is_flat = trainer.config.engine.flat_parameters != "off"
    try:
        performance = performance_of(trainer, plan, machine, settings)
    except ConfigError:
        # Another ZeRO stage than the configured one, without what is asked for by name: eager is the slowest.
        return Computing(has_flat_parameters=is_flat)
    return Computing(
        compiles_blocks=performance.compiles_blocks,
        captures_passes=performance.captures_passes,
        has_cudnn_first=performance.has_cudnn_first,
        has_flat_parameters=is_flat,
        activation_memory_budget=performance.activation_memory_budget,
    )


def _levels(config: PerformanceConfig) -> tuple[int, ...]:
    """Returns what is to choose from, in the order in which more is computed again."""
    levels = {"none": (0,), "full": (1,), "every_n": (config.recompute_every,), "auto": _EVERY}
    return levels.get(config.recompute, (0, 1))


def settings_for(settings: DeepSpeedSettings, *, where: str) -> Callable[[int, bool], DeepSpeedSettings]:
    """Returns what makes the engine's settings of a ZeRO stage, with or without offload."""
    make = partial(with_parallel, settings, where=where)
    return lambda zero_stage, is_offloaded: make(zero_stage=zero_stage, is_offloaded=is_offloaded)


def resolved_settings(
    choice: ParallelChoice, settings: DeepSpeedSettings, *, where: str
) -> DeepSpeedSettings:
    """Returns `settings` with the stage and the offload of `choice`."""
    return with_parallel(
        settings, zero_stage=choice.zero_stage, is_offloaded=choice.is_offloaded, where=where
    )
