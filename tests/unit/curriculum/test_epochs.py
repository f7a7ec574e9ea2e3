"""Phases that end by epochs get exact bounds from the number of updates that their passes take."""

from typing import Any

import pytest

from aiprod_ds.config.phase import PlateauConfig
from aiprod_ds.curriculum.epochs import with_epoch_lengths
from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.phase import PhaseEnd, RunPlan, UpdateRange
from aiprod_ds.errors import PlanError
from aiprod_ds.testing.plans import phase_plan

_PLATEAU = PlateauConfig(patience_updates=3, smoothing=0.5)


def _plan(*ends: dict[str, Any], warmup_updates: int = 0) -> RunPlan:
    """Phases that nothing but `ends` bounds."""
    rate = LearningRateSchedule(
        peak=1e-3, kind="constant", warmup_updates=warmup_updates, updates=None, final_ratio=0.1
    )
    phases = [
        phase_plan(
            index=index,
            updates=end.get("limit_updates"),
            end=PhaseEnd(**{"limit_updates": None, **end}),
            learning_rate=rate,
        )
        for index, end in enumerate(ends)
    ]
    return RunPlan(phases=tuple(phases), world_size=1)


def test_epoch_lengths_close_the_bounds() -> None:
    plan = _plan(
        {"epochs": 3},
        {"epochs": 9, "limit_updates": 10},
        {"epochs": 2, "plateau": _PLATEAU, "limit_updates": 99},
        {"epochs": 1, "minimum_updates": 6},
        {"limit_updates": 10},
    )
    known = with_epoch_lengths(plan, {0: 13, 1: 36, 2: 40, 3: 5})
    # The earliest plateau of this configuration comes after 5 updates (test_curriculum_plateau has the rule).
    assert [(p.length.minimum, p.length.maximum) for p in known.phases] == [
        (13, 13),
        (10, 10),
        (5, 40),
        (6, 6),
        (10, 10),
    ]
    assert [(p.first.minimum, p.first.maximum) for p in known.phases] == [
        (0, 0),
        (13, 13),
        (23, 23),
        (28, 63),
        (34, 69),
    ]
    assert known.total == UpdateRange(minimum=44, maximum=79)
    assert [p.learning_rate.updates for p in known.phases] == [13, 10, 40, 6, None], (
        "a decay ends with the epochs"
    )


def test_epochs_shorter_than_the_warm_up_are_refused_all_at_once() -> None:
    plan = _plan({"epochs": 1}, {"epochs": 2}, warmup_updates=4)
    with pytest.raises(PlanError) as caught:
        with_epoch_lengths(plan, {0: 4, 1: 3}, "c.yaml")
    assert caught.value.problems == tuple(
        f"c.yaml: curriculum.phases[{index}].epochs: must last longer than warmup_updates (4), got {epochs} "
        f"epochs of {updates} "
        "updates together. Raise epochs or min_updates, or lower warmup_updates."
        for index, epochs, updates in ((0, 1, 4), (1, 2, 3))
    )
    assert with_epoch_lengths(plan, {0: 5, 1: 5}).total_updates == 10
