"""Phases as they will run, written by hand for tests and benchmarks; the real ones come from
`aiprod_ds.curriculum.plan`."""

from __future__ import annotations

from typing import Any

from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.phase import PhaseEnd, PhasePlan, UpdateRange


def phase_plan(*, updates: int | None, index: int = 0, **changes: Any) -> PhasePlan:
    """Returns the plainest phase: no buckets, no loss, no decay, a constant learning rate of 1e-3, moments
    kept.

    Args:
        updates: Its length, and where its learning rate's schedule ends; None leaves both open.
        index: Its number in the run; it begins at update 0 all the same.
        changes: Fields of `PhasePlan` in place of these.
    """
    plain: dict[str, Any] = {
        "index": index,
        "name": f"phase_{index}",
        "buckets": (),
        "first": UpdateRange(minimum=0, maximum=0),
        "length": UpdateRange(minimum=updates or 1, maximum=updates),
        "end": PhaseEnd(limit_updates=updates),
        "learning_rate": LearningRateSchedule(
            peak=1e-3, kind="constant", warmup_updates=0, updates=updates, final_ratio=0.1
        ),
        "weight_decay": 0.0,
        "loss_weights": {},
        "random_flip": False,
        "activation_checkpointing": None,
        "moments": "keep",
        "moment_scale": 1.0,
    }
    return PhasePlan(**{**plain, **changes})
