"""The states of saving and the table of what leads from one to the next.

Owns the table and nothing that acts by it: `saver.py` does the work of each state and tells what has
happened.
"""

from __future__ import annotations

from enum import Enum


class SaveState(Enum):
    """What work is under way; it may have ended, but nobody has waited for it yet."""

    IDLE = "idle"  # none
    RESERVING = "reserving"  # getting memory for copies
    WRITING = "writing"  # every rank writes its shards
    COMMITTING = "committing"  # rank 0 commits and prunes


class SaveEvent(Enum):
    """What has happened, the same on all ranks."""

    RESERVE = "reserve"  # memory is asked for
    SAVE = "save"  # a save has its folder and what it writes
    DONE = "done"  # the work under way has ended well, and was waited for
    FAILED = "failed"  # a save has ended by an error, a full disk included


_NEXT = {
    (SaveState.IDLE, SaveEvent.RESERVE): SaveState.RESERVING,
    (SaveState.IDLE, SaveEvent.SAVE): SaveState.WRITING,
    (SaveState.IDLE, SaveEvent.FAILED): SaveState.IDLE,  # before anything was written
    (SaveState.RESERVING, SaveEvent.DONE): SaveState.IDLE,
    # The save did not come to wait for the memory, or could not get it: whoever waits next is told again.
    (SaveState.RESERVING, SaveEvent.FAILED): SaveState.RESERVING,
    (SaveState.WRITING, SaveEvent.DONE): SaveState.COMMITTING,
    (SaveState.WRITING, SaveEvent.FAILED): SaveState.IDLE,
    (SaveState.COMMITTING, SaveEvent.DONE): SaveState.IDLE,
    (SaveState.COMMITTING, SaveEvent.FAILED): SaveState.IDLE,
}


def next_state(state: SaveState, event: SaveEvent) -> SaveState:
    """Returns the state after `event`, which the table must have for `state`."""
    following = _NEXT.get((state, event))
    assert following is not None, f"{event.value} cannot happen while {state.value}"
    return following
