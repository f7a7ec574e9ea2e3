"""What a run chooses for the GPUs that it finds: with `engine.parallel: auto`, which it keeps from its first
start to its last resume, and with `performance.recompute`, which it chooses at every start.

Owns when is chosen and what is kept; how, is `aiprod_ds.planner.search` and `recompute.py`. What is kept
stands in the layout of every checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.planner.hardware import Machine, machine_like
from aiprod_ds.planner.search import ParallelChoice, PhaseChoice, search
from aiprod_ds.train.planning.estimate import estimator_of, resolved_settings, settings_for
from aiprod_ds.train.planning.recompute import with_recompute
from aiprod_ds.train.planning.trace import Shaped

_LOG = logging.getLogger(__name__)

Search = Callable[[RunPlan, DeepSpeedSettings], ParallelChoice]
Recomputed = tuple["ResolvedRun", tuple[str, ...]]
ChooseRecompute = Callable[["ResolvedRun"], Recomputed]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """What a run really runs with; `choice` is None where the configuration says it all."""

    plan: RunPlan
    settings: DeepSpeedSettings
    choice: ParallelChoice | None


def resolve(
    config: RunConfig,
    plan: RunPlan,
    settings: DeepSpeedSettings,
    *,
    saved: Mapping[str, Any] | None,
    search_now: Search,
    source: str,
) -> ResolvedRun:
    """Returns plan and settings with what `engine.parallel: auto` chooses, or as they are. Collective.

    Args:
        plan: For this world size.
        settings: As configured.
        saved: The layout of the checkpoint that the run goes on from.
        search_now: Chooses for this machine; called on the main rank, unless the checkpoint's choice can be
            kept.
        source: How messages name the configuration.

    Raises:
        PlanError: If nothing fits.
    """
    if config.engine.parallel != "auto":
        return ResolvedRun(plan=plan, settings=settings, choice=None)
    kept = _kept(saved, plan)
    choice = dist.from_main(lambda: search_now(plan, settings)) if kept is None else kept
    for reason in choice.reason:
        _LOG.info("parallel_chosen %s%s", reason, "" if kept is None else " (kept)")
    own = resolved_settings(choice, settings, where=source)
    return ResolvedRun(plan=choice.applied(plan), settings=own, choice=choice)


def search_here(trainer: Shaped, plan: RunPlan, settings: DeepSpeedSettings) -> ParallelChoice:
    """Returns the fastest settings that fit the GPU of this process; without one, ZeRO-1 and whole batches.

    Raises:
        PlanError: If nothing fits.
    """
    machine = this_machine()
    if machine is None:
        phases = tuple(
            PhaseChoice(
                recompute=0,
                micro_batch_sizes=tuple(bucket.micro_batch_size for bucket in phase.buckets),
            )
            for phase in plan.phases
        )
        reason = ("no GPU: ZeRO-1, recomputation off, whole batches",)
        return ParallelChoice(
            zero_stage=1, is_offloaded=False, world_size=plan.world_size, phases=phases, reason=reason
        )
    estimator = estimator_of(trainer, plan, machine, settings)
    return search(estimator, settings_for(settings, where=trainer.source), where=trainer.source)


def recompute_here(trainer: Shaped, resolved: ResolvedRun) -> Recomputed:
    """Returns the run with what its phases recompute on the GPUs of its ranks, and why. Collective.

    Nothing of it is kept: it changes no number beyond rounding.
    """
    if trainer.config.performance.recompute == "configured":
        return resolved, ()
    machine = this_machine()
    if machine is not None:
        least = min(dist.gather_objects(machine.memory_bytes))
        machine = replace(machine, memory_bytes=least)

    def choose() -> tuple[RunPlan, tuple[str, ...]]:
        plan, settings = resolved.plan, resolved.settings
        estimator = None if machine is None else estimator_of(trainer, plan, machine, settings)
        return with_recompute(trainer.config.performance, plan, settings, estimator)

    plan, reasons = dist.from_main(choose)
    return replace(resolved, plan=plan), reasons


def this_machine() -> Machine | None:
    """Returns the GPU of this process with its own memory, and the speed of the machine of the table that is
    most like it."""
    device = dist.choose_device()
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return machine_like(found.name, (found.major, found.minor), memory_bytes=found.total_memory)


def _kept(saved: Mapping[str, Any] | None, plan: RunPlan) -> ParallelChoice | None:
    """Returns the choice of a checkpoint if it is for as many ranks and fits the phases, which may have been
    edited."""
    values = None if saved is None else saved.get("parallel")
    if values is None:
        return None
    choice = ParallelChoice.from_dict(values)
    return choice if choice.fits(plan) else None
