"""Which phases starve the card: micro-batches so small that the optimizer, the host or the reading of weights
takes much of an update's time. Pure; says what larger ones would bring by the same estimate.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.planner.cost import BucketCost, Estimator, recompute_of

_LARGER = 4
_WORTH_IT = 1.2
"""Clips a second of four times the micro-batch, over those of the configured one, from which it is said."""


def starving(estimator: Estimator, plan: RunPlan, settings: DeepSpeedSettings) -> Iterator[str]:
    """Yields one line for each bucket of which four times the micro-batch fits and trains at least a fifth
    more clips a second.

    Where gradients are accumulated it is the same global batch; elsewhere a larger one, which is for the user
    to decide, because it changes what is learned in an update.
    """
    for phase in plan.phases:
        for index in range(len(phase.buckets)):
            now, larger = _pair(estimator, phase, index, settings)
            if larger is None or not larger.fits:
                continue
            gain = _clips_per_second(larger) / _clips_per_second(now)
            if gain >= _WORTH_IT:
                yield _in_words(now, larger, gain, plan.world_size)


def _pair(
    estimator: Estimator, phase: PhasePlan, index: int, settings: DeepSpeedSettings
) -> tuple[BucketCost, BucketCost | None]:
    bucket, recompute = phase.buckets[index], recompute_of(phase, settings)
    now = estimator.cost(phase, index, settings, recompute=recompute)
    size = _LARGER * bucket.micro_batch_size
    if bucket.accumulation % _LARGER == 0:
        return now, estimator.cost(phase, index, settings, recompute=recompute, micro_batch_size=size)
    if bucket.accumulation > 1:
        return now, None  # no size that is four times as large gives the same global batch
    return now, estimator.cost(
        phase, index, settings, recompute=recompute, micro_batch_size=size, accumulation=1
    )


def _clips_per_second(cost: BucketCost) -> float:
    return cost.micro_batch_size * cost.accumulation / cost.seconds_per_update


def _in_words(now: BucketCost, larger: BucketCost, gain: float, world_size: int) -> str:
    batch = larger.micro_batch_size * larger.accumulation * world_size
    is_same = larger.accumulation != now.accumulation
    how = (
        f"micro_batch_size: {larger.micro_batch_size} and accumulation: {larger.accumulation}, the same batch"
        if is_same
        else f"global_batch_size: {batch}, if the learning rate is found anew for it"
    )
    return (
        f"phase {now.name} ({now.shape}) starves the card with micro-batches of {now.micro_batch_size}: "
        f"{how}, would train {gain:.1f} times the clips a second ({larger.memory.needed / 1e9:.1f} GB)"
    )
