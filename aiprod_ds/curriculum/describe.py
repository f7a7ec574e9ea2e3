"""The plan as rows and points, for the `plan` command, the report and plots. Prints nothing."""

from __future__ import annotations

from typing import Any

from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan, UpdateRange


def describe(plan: RunPlan) -> list[dict[str, Any]]:
    """Returns one JSON-ready row for every bucket of every phase, in order.

    Lengths that the data or the loss decides are None in `updates`, `first_update`, `last_update` and `samples`, and bounded
    by the `min_` and `max_` columns. `last_update` is the index of the last update, counted from 0, so the next phase's
    `first_update` is one more.
    """
    return [_row(phase, index, bucket) for phase in plan.phases for index, bucket in enumerate(phase.buckets)]


def learning_rate_curve(plan: RunPlan, points: int) -> list[tuple[int, float]]:
    """Returns about `points` pairs (update of the run, learning rate), every phase's edges and warm-up ends among them.

    Phases of open length are drawn at their longest; one without a limit at its warm-up and as much again, at least 1.
    """
    lengths = [_drawn_length(phase) for phase in plan.phases]
    step = max(1, sum(lengths) // max(points, 1))
    curve: list[tuple[int, float]] = []
    first = 0
    for phase, length in zip(plan.phases, lengths, strict=True):
        warmup = phase.learning_rate.warmup_updates
        chosen = {*range(0, length, step), max(warmup - 1, 0), length - 1}
        curve += [(first + update, phase.learning_rate.at(update)) for update in sorted(chosen) if update < length]
        first += length
    return curve


def _row(phase: PhasePlan, index: int, bucket: BucketPlan) -> dict[str, Any]:
    end = phase.first + phase.length
    return {
        "phase": phase.index,
        "name": phase.name,
        "bucket": index,
        "height": bucket.height,
        "width": bucket.width,
        "requested_frames": bucket.requested_frames,
        "frames": bucket.frames,
        "frame_rate_hz": bucket.frame_rate_hz,
        "share": bucket.share,
        "global_batch_size": bucket.global_batch_size,
        "micro_batch_size": bucket.micro_batch_size,
        "accumulation": bucket.accumulation,
        "ends_by": _ends_by(phase),
        "updates": phase.updates,
        "min_updates": phase.length.minimum,
        "max_updates": phase.length.maximum,
        "first_update": phase.first_update,
        "last_update": None if end.exact is None else end.exact - 1,
        "samples": _samples(phase, bucket, phase.length),
        "pixels_per_update": bucket.pixels_per_update,
        "learning_rate_max": phase.learning_rate.peak,
        "schedule": phase.learning_rate.kind,
        "warmup_updates": phase.learning_rate.warmup_updates,
    }


def _ends_by(phase: PhasePlan) -> str:
    rules = {"epochs": phase.end.epochs, "plateau": phase.end.plateau, "updates": phase.end.limit_updates}
    return " or ".join(name for name, rule in rules.items() if rule is not None)


def _samples(phase: PhasePlan, bucket: BucketPlan, length: UpdateRange) -> int | None:
    """Samples of the bucket; None when its part of the phase depends on the data."""
    if length.exact is None or (bucket.share is None and len(phase.buckets) > 1):
        return None
    return round(length.exact * (1.0 if bucket.share is None else bucket.share)) * bucket.global_batch_size


def _drawn_length(phase: PhasePlan) -> int:
    return phase.length.maximum or max(2 * phase.learning_rate.warmup_updates, phase.length.minimum)
