"""Every pair of a stage and an event, and what each change does to a checkpoint: the tables are whole."""

from __future__ import annotations

from itertools import product

import pytest

from aiprod_ds.train.stages import ENDS, Change, Event, Saved, Stage, after_change, next_stage

# Written out, so that a pair that becomes possible must be thought of here too; all others are mistakes.
POSSIBLE = {
    ("MEASURE_START", "DONE"): "TRAIN",
    ("MEASURE_START", "STOP"): "INTERRUPTED",
    ("TRAIN", "PHASE_ENDED"): "MEASURE_PHASE",
    ("TRAIN", "LAST_PHASE_ENDED"): "MEASURE_LAST",
    ("TRAIN", "STOP"): "INTERRUPTED",
    ("TRAIN", "SPIKE"): "ROLLED_BACK",
    ("MEASURE_PHASE", "DONE"): "CHANGE_PHASE",
    ("MEASURE_PHASE", "STOP"): "INTERRUPTED",
    ("CHANGE_PHASE", "DONE"): "TRAIN",
    ("MEASURE_LAST", "DONE"): "COMPLETED",
    ("MEASURE_LAST", "STOP"): "INTERRUPTED",
}


@pytest.mark.parametrize(("stage", "event"), [*product(Stage, Event)])
def test_every_stage_and_event(stage: Stage, event: Event) -> None:
    expected = POSSIBLE.get((stage.name, event.name))
    if expected is None:
        with pytest.raises(AssertionError, match=f"{stage.name} cannot end by {event.name}"):
            next_stage(stage, event)
    else:
        assert next_stage(stage, event) is Stage[expected]


def test_an_end_is_reached_from_everywhere_and_left_by_nothing() -> None:
    assert {stage.name for stage in ENDS} == {"COMPLETED", "INTERRUPTED", "ROLLED_BACK"}
    assert not {stage for stage, _ in POSSIBLE} & {stage.name for stage in ENDS}
    for start in Stage:
        reached, before = {start.name}, set()
        while reached != before:
            before = set(reached)
            reached |= {following for (stage, _), following in POSSIBLE.items() if stage in reached}
        assert reached & {stage.name for stage in ENDS}, f"{start.name} goes on for ever"


KEPT = None
AFTER = {
    "RESUMED": "YES",
    "UPDATED": "NO",
    "SKIPPED": KEPT,
    "MEASURED": "NO",
    "FAULTS_FOUND": "NO",
    "SAVED": "YES",
}


@pytest.mark.parametrize(("saved", "change"), [*product(Saved, Change)])
def test_every_change_of_what_a_checkpoint_holds(saved: Saved, change: Change) -> None:
    expected = AFTER[change.name]
    assert after_change(saved, change) is (saved if expected is KEPT else Saved[expected])
