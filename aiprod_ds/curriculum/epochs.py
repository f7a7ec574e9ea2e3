"""Lengths of the phases that end by epochs, once the sampler knows how many updates one pass over their data takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aiprod_ds.curriculum.phase import PhasePlan, RunPlan, UpdateRange
from aiprod_ds.curriculum.plateau import earliest_plateau
from aiprod_ds.errors import PlanError


def with_epoch_lengths(plan: RunPlan, updates_per_epoch: Sequence[int], source: str = "configuration") -> RunPlan:
    """Returns `plan` with the bounds that follow from the data; skipped updates consume data and shorten an epoch.

    Args:
        plan: Of `plan_run`.
        updates_per_epoch: One entry a phase, >= 1: global batches in one pass over that phase's data.
        source: How messages name the configuration.

    Raises:
        PlanError: If the epochs of a phase are over before its warm-up is.
    """
    problems: list[str] = []
    phases: list[PhasePlan] = []
    first = UpdateRange(minimum=0, maximum=0)
    for phase, per_epoch in zip(plan.phases, updates_per_epoch, strict=True):
        length = phase.length if phase.end.epochs is None else _length(phase, phase.end.epochs * per_epoch)
        warmup = phase.learning_rate.warmup_updates
        if length.maximum is not None and length.maximum <= warmup:
            problems.append(
                f"{source}: curriculum.phases[{phase.index}].epochs: must last longer than warmup_updates ({warmup}), got "
                f"{phase.end.epochs} epochs of {per_epoch} updates. Raise epochs or min_updates, or lower warmup_updates."
            )
        phases.append(replace(phase, first=first, length=length))
        first = first + length
    if problems:
        raise PlanError(problems)
    return replace(plan, phases=tuple(phases))


def _length(phase: PhasePlan, epoch_updates: int) -> UpdateRange:
    end = phase.end
    longest = max(epoch_updates, end.minimum_updates)
    if end.limit_updates is not None:
        longest = min(longest, end.limit_updates)
    shortest = longest if end.plateau is None else min(_plateau_earliest(phase), longest)
    return UpdateRange(minimum=shortest, maximum=longest)


def _plateau_earliest(phase: PhasePlan) -> int:
    assert phase.end.plateau is not None, "called for plateau phases only"
    earliest = phase.learning_rate.warmup_updates + earliest_plateau(phase.end.plateau)
    return max(phase.end.minimum_updates, earliest)
