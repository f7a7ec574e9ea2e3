"""The stages of a run and what leads from one to the next, as tables.

Owns the order, not the work: `loop.py` does what a stage stands for and says how it ended. Pure; every rank
goes the same way because the events are agreed.

    MEASURE_START -> TRAIN -> MEASURE_PHASE -> CHANGE_PHASE -> TRAIN -> ... -> MEASURE_LAST -> COMPLETED

A request to stop leads to INTERRUPTED from wherever one is looked for, a spike that was found in training to
ROLLED_BACK.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Stage(Enum):
    """What the loop is doing."""

    MEASURE_START = "measure_start"
    TRAIN = "train"
    MEASURE_PHASE = "measure_phase"
    CHANGE_PHASE = "change_phase"
    MEASURE_LAST = "measure_last"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    ROLLED_BACK = "rolled_back"


class Event(Enum):
    """How a stage ended."""

    DONE = "done"
    PHASE_ENDED = "phase_ended"
    LAST_PHASE_ENDED = "last_phase_ended"
    STOP = "stop"
    SPIKE = "spike"


_NEXT: Mapping[tuple[Stage, Event], Stage] = {
    (Stage.MEASURE_START, Event.DONE): Stage.TRAIN,
    (Stage.MEASURE_START, Event.STOP): Stage.INTERRUPTED,
    (Stage.TRAIN, Event.PHASE_ENDED): Stage.MEASURE_PHASE,
    (Stage.TRAIN, Event.LAST_PHASE_ENDED): Stage.MEASURE_LAST,
    (Stage.TRAIN, Event.STOP): Stage.INTERRUPTED,
    (Stage.TRAIN, Event.SPIKE): Stage.ROLLED_BACK,
    (Stage.MEASURE_PHASE, Event.DONE): Stage.CHANGE_PHASE,
    (Stage.MEASURE_PHASE, Event.STOP): Stage.INTERRUPTED,
    (Stage.CHANGE_PHASE, Event.DONE): Stage.TRAIN,
    (Stage.MEASURE_LAST, Event.DONE): Stage.COMPLETED,
    (Stage.MEASURE_LAST, Event.STOP): Stage.INTERRUPTED,
}
ENDS = frozenset({Stage.COMPLETED, Stage.INTERRUPTED, Stage.ROLLED_BACK})


def next_stage(stage: Stage, event: Event) -> Stage:
    """Returns the stage after `stage`; a pair that has none is a mistake in the loop."""
    following = _NEXT.get((stage, event))
    assert following is not None, f"{stage.name} cannot end by {event.name}"
    return following


class Staging(Enum):
    """Whether memory for copies of the state was asked for since the phase began."""

    DUE = "due"
    ASKED_FOR = "asked_for"


class Saved(Enum):
    """Whether a checkpoint, or one under way, holds the run as it stands."""

    NO = "no"
    YES = "yes"


class Change(Enum):
    """What happens to a run that a checkpoint would have to hold, or holds."""

    RESUMED = "resumed"
    UPDATED = "updated"
    SKIPPED = "skipped"
    MEASURED = "measured"
    FAULTS_FOUND = "faults_found"
    SAVED = "saved"


_SAVED: Mapping[Change, Saved | None] = {
    Change.RESUMED: Saved.YES,
    Change.UPDATED: Saved.NO,
    # The weights are the same, and a resume repeats the skip: not worth another checkpoint of the same name.
    Change.SKIPPED: None,
    Change.MEASURED: Saved.NO,  # a stop at the edge of a phase saves before the phase is measured
    Change.FAULTS_FOUND: Saved.NO,  # skipped updates may find clips that cannot be read
    Change.SAVED: Saved.YES,
}


def after_change(saved: Saved, change: Change) -> Saved:
    """Returns whether a checkpoint still, or now, holds the run."""
    return _SAVED[change] or saved
