"""The scheduler as a table of (state, event), against a second implementation over random runs, and across resumes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.clock import Clock
from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import ModelStrides, plan_run
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Decision, Reason
from aiprod_ds.errors import CheckpointError, NonFiniteError

SHAPE = {"resolution": "64x64", "duration": {"frames": 9}, "global_batch_size": 2, "learning_rate": 1e-3, "schedule": "constant"}
PLATEAU = {"patience_updates": 2, "threshold": 0.01, "smoothing": 0.0}  # reached by the third equal loss at the earliest

STAY = Decision(action=Action.STAY, reason=Reason.RUNNING)


def plan(*ends: dict[str, Any]) -> RunPlan:
    values = {
        "output_dir": "out",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": [{"name": f"p{index}", **SHAPE, **end} for index, end in enumerate(ends)]},
    }
    return plan_run(VAETrainerConfig.model_validate(values), world_size=1, strides=ModelStrides(spatial=32, temporal=8))


def over(action: Action, reason: Reason) -> Decision:
    return Decision(action=action, reason=reason)


@dataclass
class Run:
    """A clock and a scheduler that move together, as in the loop."""

    scheduler: CurriculumScheduler
    clock: Clock = Clock()  # noqa: RUF009  frozen

    def applied(self, loss: float = 1.0, *, epoch: int = 0) -> Decision:
        needed = self.scheduler.needs_loss(self.clock)
        self.clock = self.clock.after_update(micro_batches=1, samples=2, epoch=epoch)
        return self.scheduler.observe(self.clock, loss if needed else None)

    def skipped(self, *, epoch: int = 0) -> Decision:
        self.clock = self.clock.after_skip(micro_batches=1, epoch=epoch)
        return self.scheduler.observe(self.clock, None)

    def again(self) -> Decision:
        return self.scheduler.observe(self.clock, 1e9)

    def next_phase(self) -> Decision:
        self.clock = self.clock.at_phase(self.clock.phase + 1)
        return self.scheduler.decision(self.clock)


def run(*ends: dict[str, Any], updates: int = 0) -> Run:
    made = Run(CurriculumScheduler(plan(*ends)))
    for _ in range(updates):
        made.applied()
    return made


# States: name -> a run in that state. `b` phases follow, so that NEXT_PHASE and FINISHED differ only by the plan.
COUNTED, EPOCHS = {"updates": 3}, {"epochs": 2, "min_updates": 2, "max_updates": 5}
FLAT = {"plateau": PLATEAU, "warmup_updates": 1, "max_updates": 9, "min_updates": 5}
STATES: dict[str, Callable[[], Run]] = {
    "fresh, counted": lambda: run(COUNTED, COUNTED),
    "one before the count": lambda: run(COUNTED, COUNTED, updates=2),
    "at the count": lambda: run(COUNTED, COUNTED, updates=3),
    "one before the count, last phase": lambda: run(COUNTED, updates=2),
    "at the count, last phase": lambda: run(COUNTED, updates=3),
    "fresh, epochs": lambda: run(EPOCHS, COUNTED),
    "epochs at the minimum": lambda: run(EPOCHS, COUNTED, updates=2),
    "epochs one before the maximum": lambda: run(EPOCHS, COUNTED, updates=4),
    "plateau in warm-up": lambda: run(FLAT, COUNTED),
    "plateau reached below the minimum": lambda: run(FLAT, COUNTED, updates=4),
    "plateau reached": lambda: run(FLAT, COUNTED, updates=5),
    "plateau one before the maximum": lambda: run({**FLAT, "min_updates": 9}, COUNTED, updates=8),
}
EVENTS: dict[str, Callable[[Run], Decision]] = {
    "applied": lambda r: r.applied(),
    "applied, better loss": lambda r: r.applied(0.5),
    "applied, epochs over": lambda r: r.applied(epoch=2),
    "skipped": lambda r: r.skipped(),
    "skipped, epochs over": lambda r: r.skipped(epoch=2),
    "same clock again": lambda r: r.again(),
    "next phase": lambda r: r.next_phase(),
}
U, E, P = (over(Action.NEXT_PHASE, reason) for reason in (Reason.UPDATES, Reason.EPOCHS, Reason.PLATEAU))
F = over(Action.FINISHED, Reason.UPDATES)
S = STAY
OUTSIDE = None  # a clock beyond the last phase: the loop is wrong
TABLE: dict[str, list[Decision | None]] = {
    # events:                            applied better epochs skip skip+e again next
    "fresh, counted":                    [S, S, S, S, S, S, S],
    "one before the count":              [U, U, U, S, S, S, S],
    "at the count":                      [U, U, U, U, U, U, S],
    "one before the count, last phase":  [F, F, F, S, S, S, OUTSIDE],
    "at the count, last phase":          [F, F, F, F, F, F, OUTSIDE],
    "fresh, epochs":                     [S, S, S, S, S, S, S],
    "epochs at the minimum":             [S, S, E, S, E, S, S],
    "epochs one before the maximum":     [U, U, U, S, E, S, S],
    "plateau in warm-up":                [S, S, S, S, S, S, S],
    "plateau reached below the minimum": [P, S, P, S, S, S, S],
    "plateau reached":                   [P, S, P, P, P, P, S],
    "plateau one before the maximum":    [U, U, U, S, S, S, S],
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", EVENTS)
def test_every_state_and_event(state: str, event: str) -> None:
    expected = TABLE[state][list(EVENTS).index(event)]
    made = STATES[state]()
    if expected is OUTSIDE:
        with pytest.raises(AssertionError, match="clock in phase 1"):
            EVENTS[event](made)
        return
    assert EVENTS[event](made) == expected
    saved = made.scheduler.state_dict()
    assert made.scheduler.decision(made.clock) == expected  # asking changes nothing
    assert made.scheduler.observe(made.clock, None) == expected  # nor does the same clock again
    if event != "next phase":
        assert made.scheduler.state_dict() == saved


@pytest.mark.parametrize("state", STATES)
def test_decision_survives_a_resume_in_every_state(state: str) -> None:
    made = STATES[state]()
    fresh = CurriculumScheduler(RunPlan(phases=made.scheduler._phases, world_size=1))
    fresh.load_state_dict(json.loads(json.dumps(made.scheduler.state_dict())))
    assert fresh.decision(made.clock) == made.scheduler.decision(made.clock)
    assert fresh.state_dict() == made.scheduler.state_dict()


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


def test_non_finite_window_stops_the_run() -> None:
    made = run({"plateau": PLATEAU, "max_updates": 9}, updates=1)
    made.applied(float("nan"))
    with pytest.raises(NonFiniteError):
        made.applied(float("inf"))


def test_more_phases_after_the_end_go_on() -> None:
    made = run(COUNTED, updates=3)
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
def test_foreign_or_damaged_state_is_refused_and_changes_nothing(damage: dict[str, Any], message: str) -> None:
    made = run(COUNTED, updates=2)
    before = made.scheduler.state_dict()
    with pytest.raises(CheckpointError, match=message):
        made.scheduler.load_state_dict({**before, **damage})
    assert made.scheduler.state_dict() == before


_ends = st.fixed_dictionaries(
    {"max_updates": st.integers(4, 30)},
    optional={"epochs": st.integers(1, 3), "min_updates": st.integers(1, 4), "warmup_updates": st.integers(0, 3)},
).flatmap(lambda end: st.sampled_from([end, {**end, "plateau": PLATEAU}]))
_runs = st.lists(st.tuples(st.sampled_from([1.0, 0.9, 0.5, 2.0]), st.booleans()), min_size=150, max_size=150)


def _expected_reason(end: dict[str, Any], losses: list[float], epoch: int) -> Reason:
    """The definition, from the whole history instead of a running state. Smoothing is 0, so the loss is its own mean."""
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


@settings(deadline=None, max_examples=200)
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
