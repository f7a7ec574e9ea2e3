"""The fastest settings that fit: ZeRO stage and offload for the run, recomputation for each phase,
micro-batch for each bucket.

Pure and deterministic. For each stage, each phase takes recomputation off before on and the largest
micro-batch that fits; the stage with the least GPU-hours in all wins, the first of equals.
`engine.parallel: auto` runs with the result, `plan --machine` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.errors import CheckpointError, EngineError, PlanError
from aiprod_ds.planner.cost import BucketCost, Estimator, recompute_in_words, total_gpu_hours

STAGES = ((1, False), (2, False), (3, False), (2, True), (3, True))
"""ZeRO stage and whether the optimizer is offloaded, in the order in which equals are preferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChoice:
    """What one phase runs with: of how many blocks it recomputes one, and the micro-batch of each bucket."""

    recompute: int
    micro_batch_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelChoice:
    """What a run runs with in place of what it does not say.

    Attributes:
        world_size: The only one that `fits`.
        reason: Why, in words; one line for each phase.
    """

    zero_stage: int
    is_offloaded: bool
    world_size: int
    phases: tuple[PhaseChoice, ...]
    reason: tuple[str, ...] = ()

    def fits(self, plan: RunPlan) -> bool:
        """Returns whether `plan` is for as many ranks and its batches can be split like this."""
        sizes = [phase.micro_batch_sizes for phase in self.phases]
        own = [
            [bucket.global_batch_size // plan.world_size for bucket in phase.buckets] for phase in plan.phases
        ]
        return (
            self.world_size == plan.world_size
            and [len(each) for each in sizes] == [len(each) for each in own]
            and all(
                whole % size == 0
                for some, all_ in zip(sizes, own, strict=True)
                for size, whole in zip(some, all_, strict=True)
            )
        )

    def applied(self, plan: RunPlan) -> RunPlan:
        """Returns `plan` with these micro-batches and this recomputation."""
        return replace(
            plan,
            phases=tuple(_applied(phase, own) for phase, own in zip(plan.phases, self.phases, strict=True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping; it stands in the layout of checkpoints, whose keys do not move."""
        phases = [
            {
                "is_checkpointed": phase.recompute > 0,
                "micro_batch_sizes": phase.micro_batch_sizes,
                **({"recompute_every": phase.recompute} if phase.recompute > 1 else {}),
            }
            for phase in self.phases
        ]
        return {**asdict(self), "phases": phases}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParallelChoice:
        """Returns what `to_dict` gave.

        Raises:
            CheckpointError: If it gave something else.
        """
        try:
            phases = tuple(
                PhaseChoice(
                    recompute=phase.get("recompute_every", int(phase["is_checkpointed"])),
                    micro_batch_sizes=tuple(phase["micro_batch_sizes"]),
                )
                for phase in values["phases"]
            )
            choice = cls(**{**values, "phases": phases, "reason": tuple(values["reason"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(values) from error
        sizes = [size for phase in phases for size in phase.micro_batch_sizes]
        if any(
            type(count) is not int or count < 1 for count in (choice.zero_stage, choice.world_size, *sizes)
        ):
            raise _damaged(values)
        return choice


def _damaged(values: object) -> CheckpointError:
    return CheckpointError(
        f"layout.parallel: must be a saved choice, got {str(values)[:200]}. The checkpoint is damaged."
    )


def search(
    estimator: Estimator, settings_of: Callable[[int, bool], DeepSpeedSettings], *, where: str
) -> ParallelChoice:
    """Returns the settings with the least GPU-hours of those that fit.

    Args:
        estimator: Of its plan's batches only the global ones count; how they are split is searched.
        settings_of: Engine settings for a ZeRO stage, with or without offload.
        where: How messages name the run.

    Raises:
        PlanError: If nothing fits.
    """
    found: list[tuple[float, ParallelChoice]] = []
    smallest: list[BucketCost] = []
    for stage, is_offloaded in STAGES:
        settings = settings_of(stage, is_offloaded)
        phases = [_fastest(estimator, phase, settings, smallest) for phase in estimator.plan.phases]
        costs = [phase for phase in phases if phase is not None]
        if len(costs) == len(phases):
            found.append((sum(map(total_gpu_hours, costs)), _choice(stage, is_offloaded, costs, estimator)))
    if not found:
        least = min(smallest, key=lambda cost: cost.memory.needed)
        machine = estimator.machine
        raise PlanError(
            f"{where}: must fit {machine.name} with {estimator.plan.world_size} GPUs, got phase "
            f"{least.name}, which needs "
            f"{least.memory.needed / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB at the least "
            f"(ZeRO-{least.zero_stage}, "
            f"micro-batch {least.micro_batch_size}) and "
            f"{least.memory.host / 1e9:.1f} of {machine.host_memory_bytes / 1e9:.1f} GB of the host. "
            "Take more or larger GPUs, smaller clips, or adapters."
        )
    return min(found, key=lambda pair: pair[0])[1]


def _fastest(
    estimator: Estimator, phase: PhasePlan, settings: DeepSpeedSettings, smallest: list[BucketCost]
) -> list[BucketCost] | None:
    """Returns the buckets of one phase with what is fastest of that which fits; None if nothing does."""
    candidates = []
    for recompute in estimator.recompute_levels:
        try:
            costs = [
                _largest(estimator, phase, index, settings, recompute) for index in range(len(phase.buckets))
            ]
        except EngineError:
            continue  # the model has no blocks to recompute
        smallest += [cost for cost in costs if not cost.fits]
        if all(cost.fits for cost in costs):
            candidates.append(costs)
    return min(candidates, key=total_gpu_hours) if candidates else None


def _largest(
    estimator: Estimator, phase: PhasePlan, index: int, settings: DeepSpeedSettings, recompute: int
) -> BucketCost:
    """Returns the bucket with the largest micro-batch that fits, or with one clip if none does."""
    bucket = phase.buckets[index]
    own = bucket.global_batch_size // estimator.plan.world_size
    for size in sorted((size for size in range(1, own + 1) if own % size == 0), reverse=True):
        cost = estimator.cost(phase, index, settings, recompute=recompute, micro_batch_size=size)
        if cost.fits:
            break
    return cost


def _choice(
    stage: int, is_offloaded: bool, costs: Sequence[Sequence[BucketCost]], estimator: Estimator
) -> ParallelChoice:
    machine = estimator.machine
    reason = tuple(
        f"phase {buckets[0].name}: ZeRO-{stage}{' with offload' if is_offloaded else ''}, recomputation "
        f"{recompute_in_words(buckets[0].recompute)}, micro-batch "
        f"{' and '.join(f'{cost.micro_batch_size} x {cost.accumulation}' for cost in buckets)}: needs "
        f"{max(cost.memory.needed for cost in buckets) / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB "
        f"({machine.name}), "
        f"{buckets[0].seconds_per_update:.2f} s per update estimated"
        for buckets in costs
    )
    phases = tuple(
        PhaseChoice(
            recompute=buckets[0].recompute,
            micro_batch_sizes=tuple(cost.micro_batch_size for cost in buckets),
        )
        for buckets in costs
    )
    return ParallelChoice(
        zero_stage=stage,
        is_offloaded=is_offloaded,
        world_size=estimator.plan.world_size,
        phases=phases,
        reason=reason,
    )


def _applied(phase: PhasePlan, own: PhaseChoice) -> PhasePlan:
    buckets = tuple(
        replace(
            bucket, micro_batch_size=size, accumulation=bucket.micro_batch_size * bucket.accumulation // size
        )
        for bucket, size in zip(phase.buckets, own.micro_batch_sizes, strict=True)
    )
    return replace(
        phase,
        buckets=buckets,
        activation_checkpointing=own.recompute > 0,
        recompute_every=own.recompute,
    )
