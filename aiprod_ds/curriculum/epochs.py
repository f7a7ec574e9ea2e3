"""Lengths and decays of the phases that end by epochs, once the sampler knows how many updates their passes
take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from aiprod_ds.curriculum.phase import PhasePlan, RunPlan, UpdateRange
from aiprod_ds.curriculum.plateau import earliest_plateau
from aiprod_ds.errors import PlanError


def with_epoch_lengths(
    plan: RunPlan, epoch_updates: Mapping[int, int], source: str = "configuration"
) -> RunPlan:
    """Returns `plan` with the bounds that follow from the data; skipped updates consume data and shorten an
    epoch.

    Args:
        plan: With the bounds that the configuration alone gives, from `plan_run`.
        epoch_updates: Of every phase with `epochs`, by its index: the updates, >= 1, that these epochs take
            together. They are counted at once because passes over the same data differ by an update where
            batches do not divide them.
        source: How messages name the configuration.

    Raises:
        PlanError: If the epochs of a phase are over before its warm-up is.
    """
    problems: list[str] = []
    phases: list[PhasePlan] = []
    first = UpdateRange(minimum=0, maximum=0)
    for phase in plan.phases:
        length, rate = phase.length, phase.learning_rate
        if phase.end.epochs is not None:
            length = _length(phase, epoch_updates[phase.index])
            rate = replace(
                rate, updates=length.maximum
            )  # the decay ends with the epochs, not with a later max_updates
        warmup = phase.learning_rate.warmup_updates
        if length.maximum is not None and length.maximum <= warmup:
            problems.append(
                f"{source}: curriculum.phases[{phase.index}].epochs: must last longer than warmup_updates "
                f"({warmup}), got "
                f"{phase.end.epochs} epochs of {epoch_updates[phase.index]} updates together. "
                "Raise epochs or min_updates, or lower warmup_updates."
            )
        phases.append(replace(phase, first=first, length=length, learning_rate=rate))
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
