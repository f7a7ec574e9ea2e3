"""Whether a run state agrees with itself: the clock with its own counters, the scheduler, the history and the
layout.

Hashes find damage, not a state that somebody or some program has edited and described anew. A clock that is
wrong would train other data at other rates without a word, so it is refused. Owns what must hold of any
state; what a curriculum says of it is compared where a run goes on. Called by `store.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError

_LAYOUT: dict[str, type] = {"engine": str, "world_size": int, "zero_stage": int, "precision": str}


def require_consistent(state: RunState, *, where: str) -> None:
    """Checks a run state that was read.

    Args:
        state: Of any run.
        where: How messages name the checkpoint.

    Raises:
        CheckpointError: With the first contradiction.
    """
    problem = next(_problems(state), None)
    if problem is not None:
        raise CheckpointError(
            f"{where}: {problem}. It was changed after it was saved: take another checkpoint."
        )


def require_layout(layout: Mapping[str, Any], *, where: str) -> None:
    """Checks that a layout says on what was saved, of which the readers of a checkpoint make words.

    Raises:
        CheckpointError: If it does not.
    """
    if missing := sorted(_LAYOUT.keys() - layout.keys()):
        raise CheckpointError(
            f"{where}: layout must have {', '.join(sorted(_LAYOUT))}, got none of {', '.join(missing)}. Take "
            "another checkpoint."
        )


def _problems(state: RunState) -> Iterator[str]:
    clock = state.clock
    yield from _of_clock(clock)
    phases = len(state.phase_fingerprints)
    if phases <= clock.phase:
        yield f"clock.phase: must be below {phases}, the phases of the run, got {clock.phase}"
    yield from _of_scheduler(state.scheduler, clock)
    yield from _of_layout(state.layout)
    yield from _of_history(state.history, clock)


def _of_clock(clock: Clock) -> Iterator[str]:
    for whole, part in (("updates", "phase_updates"), ("skipped_updates", "phase_skipped")):
        all_, own = getattr(clock, whole), getattr(clock, part)
        if own > all_ or (clock.phase == 0 and own != all_):
            rule = f"equal clock.{whole} ({all_}) in the first phase" if own <= all_ else f"be at most {all_}"
            yield f"clock.{part}: must {rule}, got {own}"
    before, made = clock.updates - clock.phase_updates, clock.updates + clock.skipped_updates
    if before < clock.phase:
        yield f"clock.phase: must be at most the {before} updates before this phase, got {clock.phase}"
    if clock.micro_batches < made:
        yield f"clock.micro_batches: must be at least {made}, the updates, got {clock.micro_batches}"
    if clock.samples < clock.updates or (clock.samples and not clock.updates):
        yield f"clock.samples: must be at least one for each of {clock.updates} updates, got {clock.samples}"
    if clock.epoch and not clock.phase_position:
        yield f"clock.epoch: must be 0 where its phase begins, got {clock.epoch}"


def _of_scheduler(scheduler: Mapping[str, Any], clock: Clock) -> Iterator[str]:
    """Yields where the scheduler has not seen what the clock counts; it enters a phase with the first update
    of it."""
    if "phase" not in scheduler:  # its own reader says what is missing
        return
    phase = scheduler.get("phase")
    seen = (scheduler.get("seen_updates"), scheduler.get("seen_skipped"))
    own = (clock.phase_updates, clock.phase_skipped)
    if phase == clock.phase and seen != own:
        yield f"clock: must stand where the scheduler does, at {seen} updates of the phase, got {own}"
    if phase != clock.phase and (type(phase) is not int or phase > clock.phase or any(own)):
        yield f"clock.phase: must be the scheduler's ({phase}), got {clock.phase}"


def _of_layout(layout: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in _LAYOUT.items():
        least = 1 if key == "world_size" else 0
        value: Any = layout.get(key, "" if kind is str else least)
        if type(value) is not kind or (isinstance(value, int) and value < least):
            yield f"layout.{key}: must be {'text' if kind is str else 'a count'}, got {str(value)[:80]!r}"
    batches = layout.get("global_batch_sizes", [])
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        yield f"layout.global_batch_sizes: must be a list, got {str(batches)[:80]!r}"


def _of_history(history: Mapping[str, Any], clock: Clock) -> Iterator[str]:
    updates = history.get("phase_updates", {})
    is_told = "phase_updates" in history
    if not isinstance(updates, Mapping) or any(type(count) is not int for count in updates.values()):
        yield f"history.phase_updates: must be counts by phase, got {str(updates)[:80]!r}"
    elif (
        is_told and len(updates) in (clock.phase, clock.phase + 1) and sum(updates.values()) != clock.updates
    ):
        yield (
            f"clock.updates: must be the sum of all phases' in the history, {sum(updates.values())}, got "
            f"{clock.updates}"
        )
    for name, later in _moments(history):
        if type(later) is not int or later > clock.updates:
            yield f"history.{name}: must not be after update {clock.updates}, got {str(later)[:80]}"


def _moments(history: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields where the history says that something was done."""
    measured, evaluated = history.get("measured"), history.get("evaluated")
    if isinstance(measured, Mapping) and measured:
        yield "measured.updates", measured.get("updates")
    if isinstance(evaluated, Mapping):
        for name, moment in evaluated.items():
            if isinstance(moment, Mapping):
                yield f"evaluated.{name}.updates", moment.get("updates")
    not_saved = history.get("not_saved")
    if isinstance(not_saved, Sequence) and not isinstance(not_saved, str):
        for entry in not_saved:
            if isinstance(entry, Mapping):
                yield "not_saved.update", entry.get("update")
