"""`performance.recompute`: of how many blocks a phase computes one again in its backward pass, and why.

Owns the rules; memory comes from the planner's estimate, and the switch is `aiprod_ds.engine.recompute`.
Called for a run by `auto.py`, and by what estimates one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.run import PerformanceConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.errors import AiprodError, EngineError
from aiprod_ds.planner.cost import BucketCost, Estimator

_LOG = logging.getLogger(__name__)


def with_recompute(
    config: PerformanceConfig, plan: RunPlan, settings: DeepSpeedSettings, estimator: Estimator | None
) -> tuple[RunPlan, tuple[str, ...]]:
    """Returns `plan` with what `performance.recompute` makes of its phases, and one line for each that it
    decides about.

    Args:
        config: What was asked for.
        plan: Phases with an `activation_checkpointing` of their own, and those of which something was chosen
            already, stay as they are.
        settings: Of the engine.
        estimator: Of the GPUs; None for a CPU.
    """
    if config.recompute == "configured":
        return plan, ()
    phases, reasons = [], []
    for phase in plan.phases:
        if phase.recompute_every is not None or phase.activation_checkpointing is not None:
            phases.append(phase)
            continue
        every, why = _chosen(config, phase, settings, estimator)
        phases.append(replace(phase, recompute_every=every))
        reasons.append(f"recompute {_in_words(every)} in phase {phase.name}: {why}")
    return replace(plan, phases=tuple(phases)), tuple(reasons)


def _chosen(
    config: PerformanceConfig, phase: PhasePlan, settings: DeepSpeedSettings, estimator: Estimator | None
) -> tuple[int, str]:
    by_name = {"none": 0, "full": 1, "every_n": config.recompute_every}
    if config.recompute in by_name:
        return by_name[config.recompute], "as configured"
    if estimator is None:
        return 0, "on a CPU memory is not estimated"
    try:
        with torch.random.fork_rng(devices=[]):
            return _fewest(phase, settings, estimator)
    except AiprodError:
        raise
    except Exception as error:  # noqa: BLE001  a model of anyone's own may do anything on the meta device
        _LOG.warning("recompute_not_estimated reason=%s: %s", type(error).__name__, str(error)[:300])
        default = int(settings.activation_checkpointing)
        return default, "as the DeepSpeed settings say: the model cannot be estimated"


def _fewest(phase: PhasePlan, settings: DeepSpeedSettings, estimator: Estimator) -> tuple[int, str]:
    """Returns the first of the levels with which the phase fits, or the last: they keep less and less."""
    has = f"of {estimator.machine.memory_bytes / 1e9:.1f} GB"
    tried: list[str] = []
    every = 0
    for level in estimator.recompute_levels:
        try:
            costs = [
                estimator.cost(phase, index, settings, recompute=level) for index in range(len(phase.buckets))
            ]
        except EngineError:
            return 0, "the model has no repeated blocks"
        every, needed = level, _most(costs)
        if all(cost.fits for cost in costs):
            without = f"; {tried[-1]}" if tried else ""
            return level, f"needs {needed} {has}{without}"
        tried.append(f"{_in_words(level)} would need {needed}")
    return every, f"nothing fits {estimator.machine.name}, {has[3:]}, and {tried[-1]}"


def _most(costs: Sequence[BucketCost]) -> str:
    return f"{max(cost.memory.needed for cost in costs) / 1e9:.1f}"


def _in_words(every: int) -> str:
    return f"1 of {every} blocks" if every > 1 else "full" if every else "none"
