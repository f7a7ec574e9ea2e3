"""The scheduler as a table of (state, event), against a second implementation over random runs, and across
resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.clock import Clock
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Decision, Reason
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, NonFiniteError

SHAPE = {
    "resolution": "64x64",
    "duration": {"frames": 9},
    "global_batch_size": 2,
    "learning_rate": 1e-3,
    "schedule": "constant",
}
PLATEAU = {
    "patience_updates": 2,
    "threshold": 0.01,
    "smoothing": 0.0,
}  # reached by the third equal loss at the earliest

STAY = Decision(action=Action.STAY, reason=Reason.RUNNING)


@lru_cache(maxsize=64)
def _plan(ends: str) -> RunPlan:
    values = {
        "output_dir": "out",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {
            "phases": [{"name": f"p{index}", **SHAPE, **end} for index, end in enumerate(json.loads(ends))]
        },
    }
    return plan_run(
        VAETrainerConfig.model_validate(values), world_size=1, strides=ModelStrides(spatial=32, temporal=8)
    )


def plan(*ends: dict[str, Any]) -> RunPlan:
    return _plan(json.dumps(ends))


def over(action: Action, reason: Reason) -> Decision:
    return Decision(action=action, reason=reason)


@dataclass
class Run:
    """A clock and a scheduler that move together, as in the loop."""

    scheduler: CurriculumScheduler
    clock: Clock = Clock()  # noqa: RUF009  frozen

    def applied(self, loss: float = 1.0, *, epoch: int | None = None) -> Decision:
        needed = self.scheduler.needs_loss(self.clock)
        self.clock = self.clock.after_update(
            micro_batches=1, samples=2, epoch=self.clock.epoch if epoch is None else epoch
        )
        return self.scheduler.observe(self.clock, loss if needed else None)

    def skipped(self, *, epoch: int | None = None) -> Decision:
        self.clock = self.clock.after_skip(
            micro_batches=1, epoch=self.clock.epoch if epoch is None else epoch
        )
        return self.scheduler.observe(self.clock, None)

    def again(self) -> Decision:
        return self.scheduler.observe(self.clock, 1e9)

    def next_phase(self) -> Decision:
        self.clock = self.clock.at_phase(self.clock.phase + 1)
        return self.scheduler.decision(self.clock)

    def resumed(self, planned: RunPlan) -> Run:
        """The same moment in a new process: only the clock and the saved state are left."""
        fresh = CurriculumScheduler(planned)
        fresh.load_state_dict(json.loads(json.dumps(self.scheduler.state_dict())))
        return Run(fresh, self.clock)


def run(*ends: dict[str, Any], updates: int = 0, losses: Sequence[float] = (), epoch: int = 0) -> Run:
    """A run after `updates` updates with loss 1 and then one for each of `losses`, the last at `epoch`."""
    made = Run(CurriculumScheduler(plan(*ends)))
    history = [1.0] * updates + list(losses)
    for index, loss in enumerate(history):
        made.applied(loss, epoch=epoch if index + 1 == len(history) else 0)
    return made


def second_phase(*ends: dict[str, Any]) -> Run:
    made = run(*ends, updates=4)
    made.next_phase()
    return made


# Two losses fill the mean; the plateau is reached by the fifth that is no better, the sixth update with the
# warm-up.
RULE = {"patience_updates": 3, "threshold": 0.01, "smoothing": 0.5}
COUNTED = {"updates": 4, "warmup_updates": 2}
PASSES = {"epochs": 2, "min_updates": 2, "max_updates": 5}
FREE = {"plateau": RULE, "warmup_updates": 1, "max_updates": 12}
HELD = {**FREE, "min_updates": 7}

STATES: dict[str, tuple[tuple[dict[str, Any], ...], Callable[..., Run]]] = {
    "counted: begin": ((COUNTED, COUNTED), partial(run)),
    "counted: in warm-up": ((COUNTED, COUNTED), partial(run, updates=1)),
    "counted: after warm-up": ((COUNTED, COUNTED), partial(run, updates=2)),
    "counted: one before the limit": ((COUNTED, COUNTED), partial(run, updates=3)),
    "counted: at the limit": ((COUNTED, COUNTED), partial(run, updates=4)),
    "passes: begin": ((PASSES, COUNTED), partial(run)),
    "passes: one before the minimum": ((PASSES, COUNTED), partial(run, updates=1)),
    "passes: over below the minimum": ((PASSES, COUNTED), partial(run, updates=1, epoch=2)),
    "passes: at the minimum": ((PASSES, COUNTED), partial(run, updates=2)),
    "passes: over": ((PASSES, COUNTED), partial(run, updates=3, epoch=2)),
    "passes: one before the limit": ((PASSES, COUNTED), partial(run, updates=4)),
    "plateau: in warm-up": ((HELD, COUNTED), partial(run)),
    "plateau: mean still fills": ((HELD, COUNTED), partial(run, updates=2)),
    "plateau: patience runs": ((HELD, COUNTED), partial(run, updates=4)),
    "plateau: one loss before it": ((FREE, COUNTED), partial(run, updates=5)),
    "plateau: reached below the minimum": ((HELD, COUNTED), partial(run, updates=6)),
    "plateau: reached": ((HELD, COUNTED), partial(run, updates=7)),
    "plateau: two NaN in a row": ((FREE, COUNTED), partial(run, updates=4, losses=[math.nan] * 2)),
    "plateau: one before the limit": (({**FREE, "min_updates": 12}, COUNTED), partial(run, updates=11)),
    "second phase: begin": ((COUNTED, FREE), partial(second_phase)),
    "last: one before the limit": ((COUNTED,), partial(run, updates=3)),
    "last: at the limit": ((COUNTED,), partial(run, updates=4)),
    "last: passes over": ((PASSES,), partial(run, updates=3, epoch=2)),
    "last: plateau reached": ((HELD,), partial(run, updates=7)),
}
EVENTS: dict[str, Callable[[Run], Decision]] = {
    "equal loss": lambda r: r.applied(),
    "better loss": lambda r: r.applied(0.5),
    "rising loss": lambda r: r.applied(2.0),
    "noise below the threshold": lambda r: r.applied(0.99),
    "NaN loss": lambda r: r.applied(math.nan),
    "applied at an epoch's end": lambda r: r.applied(epoch=2),
    "skipped": lambda r: r.skipped(),
    "skipped at an epoch's end": lambda r: r.skipped(epoch=2),
    "same clock again": lambda r: r.again(),
    "next phase": lambda r: r.next_phase(),
}
# A dot stays. U, E, P go to the next phase, u, e, p finish the run: by updates, epochs or plateau.
# ! raises NonFiniteError; x is a bug of the caller: there is no next phase.
DECISIONS = {
    ".": STAY,
    **{
        reason.value[0].upper(): over(Action.NEXT_PHASE, reason)
        for reason in (Reason.UPDATES, Reason.EPOCHS, Reason.PLATEAU)
    },
    **{
        reason.value[0]: over(Action.FINISHED, reason)
        for reason in (Reason.UPDATES, Reason.EPOCHS, Reason.PLATEAU)
    },
}
TABLE = {
    #                                    equal better rising noise NaN epoch skip skip+epoch again next
    "counted: begin":                     ".     .      .      .    .    .    .        .       .    .",
    "counted: in warm-up":                ".     .      .      .    .    .    .        .       .    .",
    "counted: after warm-up":             ".     .      .      .    .    .    .        .       .    .",
    "counted: one before the limit":      "U     U      U      U    U    U    .        .       .    .",
    "counted: at the limit":              "U     U      U      U    U    U    U        U       U    .",
    "passes: begin":                      ".     .      .      .    .    .    .        .       .    .",
    "passes: one before the minimum":     ".     .      .      .    .    E    .        .       .    .",
    "passes: over below the minimum":     "E     E      E      E    E    E    .        .       .    .",
    "passes: at the minimum":             ".     .      .      .    .    E    .        E       .    .",
    "passes: over":                       "E     E      E      E    E    E    E        E       E    .",
    "passes: one before the limit":       "U     U      U      U    U    U    .        E       .    .",
    "plateau: in warm-up":                ".     .      .      .    .    .    .        .       .    .",
    "plateau: mean still fills":          ".     .      .      .    .    .    .        .       .    .",
    "plateau: patience runs":             ".     .      .      .    .    .    .        .       .    .",
    "plateau: one loss before it":        "P     .      P      P    .    P    .        .       .    .",
    "plateau: reached below the minimum": "P     .      P      P    P    P    .        .       .    .",
    "plateau: reached":                   "P     .      P      P    P    P    P        P       P    .",
    "plateau: two NaN in a row":          ".     .      .      .    !    .    .        .       .    .",
    "plateau: one before the limit":      "U     U      U      U    U    U    .        .       .    .",
    "second phase: begin":                ".     .      .      .    .    .    .        .       .    x",
    "last: one before the limit":         "u     u      u      u    u    u    .        .       .    x",
    "last: at the limit":                 "u     u      u      u    u    u    u        u       u    x",
    "last: passes over":                  "e     e      e      e    e    e    e        e       e    x",
    "last: plateau reached":              "p     .      p      p    p    p    p        p       p    x",
}  # fmt: skip


def test_the_table_is_complete() -> None:
    assert list(TABLE) == list(STATES)
    assert {len(row.split()) for row in TABLE.values()} == {len(EVENTS)}


@pytest.mark.parametrize("is_resumed", [False, True], ids=["live", "resumed"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_every_state_and_event(state: str, event: str, is_resumed: bool) -> None:
    ends, make = STATES[state]
    made = make(*ends)
    if is_resumed:
        made = made.resumed(plan(*ends))
    letter = TABLE[state].split()[list(EVENTS).index(event)]
    if letter == "x":
        with pytest.raises(AssertionError, match="clock in phase"):
            EVENTS[event](made)
    elif letter == "!":
        with pytest.raises(NonFiniteError, match="got 3 NaN or infinite losses in a row"):
            EVENTS[event](made)
    else:
        assert EVENTS[event](made) == DECISIONS[letter]
        saved = made.scheduler.state_dict()
        assert made.scheduler.decision(made.clock) == DECISIONS[letter]  # asking changes nothing
        assert made.scheduler.state_dict() == saved
        assert made.scheduler.observe(made.clock, None) == DECISIONS[letter]  # nor does the same clock again
        if event != "next phase":
            assert made.scheduler.state_dict() == saved


@pytest.mark.parametrize("state", STATES)
def test_a_resume_in_every_state_changes_nothing(state: str) -> None:
    ends, make = STATES[state]
    made = make(*ends)
    fresh = made.resumed(plan(*ends))
    assert fresh.scheduler.decision(made.clock) == made.scheduler.decision(made.clock)
    assert fresh.scheduler.needs_loss(made.clock) == made.scheduler.needs_loss(made.clock)
    assert fresh.scheduler.state_dict() == made.scheduler.state_dict()


def test_loss_is_needed_only_where_a_plateau_looks_at_it() -> None:
    made = run({"plateau": PLATEAU, "warmup_updates": 2, "max_updates": 9}, COUNTED)
    needs = []
    for _ in range(3):
        needs.append(made.scheduler.needs_loss(made.clock))
        made.applied()
    assert needs == [False, False, True]
    made.next_phase()
    assert not made.scheduler.needs_loss(made.clock)


def test_withheld_loss_and_a_clock_that_went_back_are_bugs_of_the_caller() -> None:
    made = run({"plateau": PLATEAU, "max_updates": 9}, updates=2)
    later = made.clock.after_update(micro_batches=1, samples=2, epoch=0)
    with pytest.raises(AssertionError, match="needs_loss"):
        made.scheduler.observe(later, None)
    with pytest.raises(AssertionError, match="load_state_dict comes before a rollback"):
        made.scheduler.observe(Clock(updates=1, phase_updates=1), 1.0)


def test_second_phase_starts_with_a_clean_plateau() -> None:
    flat = {"plateau": PLATEAU, "max_updates": 9}
    made = run(flat, flat, updates=3)
    assert made.next_phase() == STAY
    assert [made.applied().reason for _ in range(3)] == [Reason.RUNNING, Reason.RUNNING, Reason.PLATEAU]


def test_more_phases_after_the_end_go_on() -> None:
    made = run(COUNTED, updates=4)
    longer = CurriculumScheduler(plan(COUNTED, COUNTED))
    longer.load_state_dict(made.scheduler.state_dict())
    assert longer.decision(made.clock) == over(Action.NEXT_PHASE, Reason.UPDATES)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": 2}, "must be a scheduler state of format 1"),
        ({"extra": 1}, "must be a scheduler state of format 1"),
        ({"phase": -1}, "must be non-negative integers"),
        ({"seen_updates": "1"}, "must be non-negative integers"),
        ({"phase": 5}, r"must be phase 5 'p0' of this configuration, got phases \['p0'\]"),
        ({"phase_name": "x"}, "must be phase 0 'x' of this configuration"),
        ({"plateau": {}}, "must be a saved plateau state"),
        ({"plateau": 3}, "must be a saved plateau state"),
    ],
)
def test_foreign_or_damaged_state_is_refused_and_changes_nothing(
    damage: dict[str, Any], message: str
) -> None:
    made = run(COUNTED, updates=2)
    before = made.scheduler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        made.scheduler.load_state_dict({**before, **damage})
    assert made.scheduler.state_dict() == before


_ends = st.fixed_dictionaries(
    {"max_updates": st.integers(4, 30)},
    optional={
        "epochs": st.integers(1, 3),
        "min_updates": st.integers(1, 4),
        "warmup_updates": st.integers(0, 3),
    },
).flatmap(lambda end: st.sampled_from([end, {**end, "plateau": PLATEAU}]))
_runs = st.lists(st.tuples(st.sampled_from([1.0, 0.9, 0.5, 2.0]), st.booleans()), min_size=150, max_size=150)


def _expected_reason(end: dict[str, Any], losses: list[float], epoch: int) -> Reason:
    """The definition, from the whole history instead of a running state. Smoothing is 0, so the loss is its
    own mean."""
    if len(losses) >= end["max_updates"]:
        return Reason.UPDATES
    if len(losses) < end.get("min_updates", 1):
        return Reason.RUNNING
    if "epochs" in end and epoch >= end["epochs"]:
        return Reason.EPOCHS
    seen = losses[end.get("warmup_updates", 0) :]
    mark = 0
    for index in range(1, len(seen)):
        if seen[index] < seen[mark] * 0.99:
            mark = index
    return Reason.PLATEAU if "plateau" in end and len(seen) - 1 - mark >= 2 else Reason.RUNNING


@settings(deadline=None, max_examples=60)
@given(ends=st.lists(_ends, min_size=1, max_size=4), events=_runs, stop=st.integers(0, 149))
def test_random_runs_follow_the_definition_with_a_resume_anywhere(
    ends: list[dict[str, Any]], events: list[tuple[float, bool]], stop: int
) -> None:
    ends = [end if {"epochs", "plateau"} & set(end) else {"updates": end["max_updates"]} for end in ends]
    planned = plan(*ends)
    made = Run(CurriculumScheduler(planned))
    losses: list[float] = []
    for index, (loss, is_applied) in enumerate(events):
        if index == stop:
            resumed = CurriculumScheduler(planned)
            resumed.load_state_dict(json.loads(json.dumps(made.scheduler.state_dict())))
            made.scheduler = resumed
        epoch = (made.clock.phase_position + 1) // 7
        decision = made.applied(loss, epoch=epoch) if is_applied else made.skipped(epoch=epoch)
        losses += [loss] * is_applied
        end = ends[made.clock.phase]
        reason = _expected_reason({"max_updates": end.get("updates"), **end}, losses, epoch)
        assert decision.reason is reason
        if reason is Reason.RUNNING:
            continue
        length = planned.phases[made.clock.phase].length
        assert length.minimum <= made.clock.phase_updates <= (length.maximum or 0)
        if made.clock.phase + 1 == len(ends):
            assert decision.action is Action.FINISHED
            break
        assert decision.action is Action.NEXT_PHASE
        assert made.next_phase() == STAY
        losses = []
