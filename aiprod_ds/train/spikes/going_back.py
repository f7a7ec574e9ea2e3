"""Where a run goes on: at a start, and after a spike; or the end of the run with all that is known of it.

Owns the choice of the checkpoint, the budget and the words. `decide` writes down what it has decided before
it returns; who calls it goes there. Main rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aiprod_ds.checkpoint.disk import discard, explained
from aiprod_ds.checkpoint.store import Checkpoint, CheckpointStore
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.errors import ConfigError, SpikeError
from aiprod_ds.train.spikes.detector import LOSS, Spike
from aiprod_ds.train.spikes.rollbacks import FILE, Rollback, Rollbacks, read_rollbacks

_LOG = logging.getLogger(__name__)
_NAMED_CLIPS, _KEPT_CLIPS = 5, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class WayBack:
    """What was decided.

    Attributes:
        rollbacks: With the new one; they stand in the run folder.
        checkpoint: To go on from, compared with its manifest; None: the run begins anew.
        builds_anew: Whether what is trained there must be built as at the start of a process.
    """

    rollbacks: Rollbacks
    checkpoint: Checkpoint | None
    builds_anew: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a decision depends on beside the spike.

    Attributes:
        folder: Of the run.
        plan: As it runs.
        started_from: The checkpoint that this process went on from; None if it began the run.
        can_begin_anew: Whether this process can make the model and open the data again as the run began with
            them.
        clips_at: Returns the names of the clips of an update, by its position in the data of the phase; empty
            where nobody knows.
    """

    folder: Path
    config: RunConfig
    plan: RunPlan
    started_from: Checkpoint | None
    can_begin_anew: bool
    clips_at: Callable[[int], Sequence[str]] = lambda _position: ()


def find_way(folder: Path, resume: str) -> WayBack:
    """Returns the verified checkpoint that a start goes on from, and what is left out on the way.

    Args:
        folder: Of the run.
        resume: `auto`, `never` or the path of a checkpoint folder.

    Raises:
        ConfigError: If it is none of these.
        CheckpointError: If checkpoints exist and none is whole.
    """
    known = Rollbacks() if resume == "never" else read_rollbacks(folder)
    checkpoint = _find(CheckpointStore(folder / "checkpoints"), resume, known)
    rollbacks = known if checkpoint is None else known.from_checkpoint(checkpoint.state)
    return WayBack(rollbacks=rollbacks, checkpoint=checkpoint)


def _find(store: CheckpointStore, resume: str, known: Rollbacks) -> Checkpoint | None:
    if resume == "never":
        return None
    if resume == "auto":
        return store.newest(accepts=known.has_way_of)
    if not Path(resume).is_dir():
        raise ConfigError(
            f"--resume: must be auto, never or a checkpoint folder, got {resume!r}, which is no folder."
        )
    return store.read(Path(resume))


def decide(spike: Spike, known: Rollbacks, rules: Rules) -> WayBack:
    """Returns the way back from `spike`, which stands in the run folder by then.

    The checkpoint is the newest that verifies and was saved before the spike began; those that were saved
    after it are deleted.

    Raises:
        SpikeError: If the budget is used up or there is nothing to go back to; says what is known.
        CheckpointError: If all checkpoints from before are damaged, or the disk fails.
    """
    clips = [name for at in range(spike.first, spike.last + 1) for name in rules.clips_at(at)]
    rollback = Rollback(
        spike=spike,
        checkpoint=None,
        learning_rate_factor=rules.plan.phases[spike.phase].learning_rate.factor,
        clips=tuple(clips[:_KEPT_CLIPS]),
        num_clips=len(clips),
    )
    store = CheckpointStore(rules.folder / "checkpoints")
    checkpoint = _newest_good(store, known.plus(rollback), rules.started_from)
    name = None if checkpoint is None else checkpoint.folder.name
    rollback = replace(rollback, checkpoint=name)
    counted = _counted(known, rollback, rules.config)
    if counted >= rules.config.spikes.max_rollbacks:
        known.write(rules.folder, stopped_by=rollback)
        if checkpoint is not None:  # with another rate the spike may not come again
            delete_given_up(rules.folder, known.plus(rollback))
        raise SpikeError(diagnosis(rollback, counted, rules))
    now = known.plus(rollback)
    now.write(rules.folder)
    _LOG.warning(
        "rolled_back to=%s phase=%d positions=%d..%d %s",
        name or "the beginning", spike.phase, spike.first, spike.last, in_words(spike),
    )  # fmt: skip
    delete_given_up(rules.folder, now)
    builds_anew = checkpoint is None or _trains_others(checkpoint, spike, rules.plan)
    if builds_anew and not rules.can_begin_anew:
        raise SpikeError(
            f"{in_words(spike)}. The run goes back to {name or 'its beginning'}, where it trains other "
            "weights than now, and a model or an iterable that was passed in is no longer as it began. "
            f"The data of the spike is noted in {FILE}: start the same program again, which leaves it out."
        )
    return WayBack(rollbacks=now, checkpoint=checkpoint, builds_anew=builds_anew)


def adopt(folder: Path, way: WayBack) -> None:
    """Makes a run folder say what a start goes on with: a checkpoint that was named may be on another way,
    and a process that decided may have been killed before it had deleted anything.

    Raises:
        CheckpointError: If the disk fails.
    """
    if read_rollbacks(folder) != way.rollbacks:
        way.rollbacks.write(folder)
    delete_given_up(folder, way.rollbacks)


def delete_given_up(folder: Path, rollbacks: Rollbacks) -> None:
    """Deletes the checkpoints that are not on the way that was decided for.

    Raises:
        CheckpointError: If the disk fails.
    """
    store = CheckpointStore(folder / "checkpoints")
    if not rollbacks.decided:
        return
    with explained(store.folder):
        for name, state in store.states():
            # One of another way, to which a run went from an older checkpoint, is nobody's spike.
            if state.is_doubtful and not rollbacks.has_way_of(state):
                _LOG.warning("checkpoint_given_up name=%s", name)
                discard(store.folder / name)


def in_words(spike: Spike) -> str:
    """Returns what was found, where."""
    span = (
        f"update {spike.update}"
        if spike.update <= spike.first_update + 1
        else f"updates {spike.first_update + 1} to {spike.update}"
    )
    what = "loss" if spike.metric == LOSS else "gradient norm"
    value = spike.value if isinstance(spike.value, str) else f"{spike.value:.4g}"
    if spike.kind == "non_finite":
        count = spike.last - spike.first + 1
        return f"{span}: the {what} was {value}, in {count} updates of the data"
    assert spike.typical is not None
    assert spike.deviations is not None
    how = "rose to" if spike.kind == "extreme" else "stayed high, last at"
    return (
        f"{span}: the {what} {how} {value}, {spike.deviations:.1f} deviations above its median of "
        f"{spike.typical:.4g}"
    )


def diagnosis(stopped_by: Rollback, counted: int, rules: Rules) -> str:
    """Returns what is known where a run stops for its spikes, and what may be tried."""
    spike, phase = stopped_by.spike, rules.plan.phases[stopped_by.spike.phase]
    factor, checkpoint = stopped_by.learning_rate_factor, stopped_by.checkpoint
    rules_of = rules.config.spikes
    budget = (
        "spikes.max_rollbacks is 0"
        if not rules_of.max_rollbacks
        else f"the run has gone back {counted} times already (spikes.max_rollbacks)"
    )
    return (
        f"phase {phase.name}, {in_words(spike)}, at a learning rate of {spike.learning_rate:.3g}; {budget}. "
        f"{_clips_in_words(stopped_by)} "
        f"{'No checkpoint' if checkpoint is None else f'The checkpoint {checkpoint}'} stands before it. "
        "Try, and start it again: "
        f"curriculum.phases[{spike.phase}].learning_rate_factor: {factor / 2:g} (a running phase takes it); "
        "other clips in place of these, with --accept-changed-data; "
        f"spikes.max_rollbacks: {rules_of.max_rollbacks + 3} to leave out more data; or, if nothing was "
        f"wrong, spikes.mode: off. All values and clips: {FILE}."
    )


def _clips_in_words(rollback: Rollback) -> str:
    if not rollback.clips:
        return "Its clips are not known by name."
    named, more = rollback.clips[:_NAMED_CLIPS], rollback.num_clips - _NAMED_CLIPS
    return f"Its clips: {', '.join(named)}{f' and {more} more' if more > 0 else ''}."


def _newest_good(
    store: CheckpointStore, now: Rollbacks, started_from: Checkpoint | None
) -> Checkpoint | None:
    found = store.newest(accepts=now.has_way_of)
    if found is None and started_from is not None and _is_there(started_from, now):
        return store.read(started_from.folder)
    return found


def _trains_others(checkpoint: Checkpoint, spike: Spike, plan: RunPlan) -> bool:
    between = plan.phases[checkpoint.state.clock.phase : spike.phase + 1]
    return not all(phase.trains_as(between[0]) for phase in between)


def _is_there(checkpoint: Checkpoint, now: Rollbacks) -> bool:
    return checkpoint.folder.is_dir() and now.has_way_of(checkpoint.state)


def _counted(known: Rollbacks, rollback: Rollback, config: RunConfig) -> int:
    """Returns how many rollbacks count against the budget."""
    spike, span = rollback.spike, config.spikes.counted_updates
    return sum(
        entry.spike.phase == spike.phase
        and entry.learning_rate_factor == rollback.learning_rate_factor
        and (span is None or entry.spike.update > spike.update - span)
        for entry in known.decided
    )
