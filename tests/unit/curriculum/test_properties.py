"""Invariants of random curricula, from configuration to the end of a simulated run, with skipped updates and
resumes anywhere."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.clock import Clock
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import describe, learning_rate_curve, totals
from aiprod_ds.curriculum.phase import RunPlan, UpdateRange
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Decision
from aiprod_ds.curriculum.strides import ModelStrides

STRIDES = ModelStrides(spatial=32, temporal=8)
LIMIT = 40  # the longest phase


@st.composite
def _phases(draw: st.DrawFn, world_size: int) -> dict[str, Any]:
    """One phase: any of the ends and their mixtures, any schedule, the batch given by any two of its
    numbers."""
    length = draw(st.integers(3, LIMIT))
    kinds = draw(st.sets(st.sampled_from(["epochs", "plateau"])))
    phase: dict[str, Any] = {
        "resolution": "32x64",
        "duration": {"frames": draw(st.integers(1, 20))},
        "learning_rate": draw(st.floats(1e-6, 1e-2)),
        "schedule": draw(st.sampled_from(["constant", "linear", "cosine"])),
        "warmup_updates": draw(st.integers(0, length - 1)),
        "max_updates" if kinds else "updates": length,
    }
    if phase["schedule"] != "constant":
        phase["final_learning_rate_ratio"] = draw(st.floats(0, 1))
    elif kinds == {"epochs"} and draw(st.booleans()):
        del phase["max_updates"]  # of open length
    if kinds:
        phase["min_updates"] = draw(st.integers(1, length))
    if "epochs" in kinds:
        phase["epochs"] = draw(st.integers(1, 4))
    if "plateau" in kinds:
        smoothing = draw(st.sampled_from([0.0, 0.5]))
        phase["plateau"] = {
            "patience_updates": draw(st.integers(2, 6)),
            "threshold": 0.01,
            "smoothing": smoothing,
        }
    micro, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    numbers = {
        "micro_batch_size": micro,
        "accumulation": accumulation,
        "global_batch_size": micro * accumulation * world_size,
    }
    left_out = draw(st.sampled_from(sorted(numbers)))
    return phase | {name: number for name, number in numbers.items() if name != left_out}


@st.composite
def _plans(draw: st.DrawFn) -> RunPlan:
    world_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    phases = draw(st.lists(_phases(world_size), min_size=2, max_size=5))
    scaling = draw(st.sampled_from(["none", "linear", "sqrt"]))
    adapter = {} if scaling == "none" else {"lr_scaling": scaling, "reference_global_batch_size": 8}
    curriculum = {
        "phases": [{"name": f"p{index}", **phase} for index, phase in enumerate(phases)],
        "adapter": adapter,
    }
    config = VAETrainerConfig.model_validate(
        {"output_dir": "out", "model": {"source": "M"}, "data": {"train": "s"}, "curriculum": curriculum}
    )
    return plan_run(config, world_size=world_size, strides=STRIDES)


@settings(deadline=None, max_examples=60)
@given(plan=_plans())
def test_bounds_add_up_and_triples_hold(plan: RunPlan) -> None:
    assert plan.phases[0].first == UpdateRange(minimum=0, maximum=0)
    for before, after in pairwise(plan.phases):
        assert after.first == before.first + before.length
    for phase in plan.phases:
        assert 1 <= phase.length.minimum <= (phase.length.maximum or math.inf)
        for bucket in phase.buckets:
            assert bucket.global_batch_size == bucket.micro_batch_size * bucket.accumulation * plan.world_size
    assert plan.total.minimum == sum(phase.length.minimum for phase in plan.phases)
    maxima = [phase.length.maximum for phase in plan.phases]
    assert plan.total.maximum == (None if None in maxima else sum(length or 0 for length in maxima))


@settings(deadline=None, max_examples=60)
@given(plan=_plans(), points=st.integers(0, 50))
def test_rows_totals_and_curve_agree_with_the_plan(plan: RunPlan, points: int) -> None:
    rows, sums = describe(plan), totals(plan)
    for row, after in pairwise(rows):
        assert after["min_first_update"] == row["min_last_update"] + 1
        assert after["max_first_update"] == (
            None if row["max_last_update"] is None else row["max_last_update"] + 1
        )
    for bound in ("min_updates", "max_updates", "min_samples", "max_samples"):
        parts = [row[bound] for row in rows]
        assert sums[bound] == (None if None in parts else sum(parts))
    curve = learning_rate_curve(plan, points)
    assert [point.update for point in curve] == sorted({point.update for point in curve})
    assert {point.phase for point in curve} == set(range(len(plan.phases)))
    if plan.total.maximum is not None:
        assert curve[-1].update == plan.total.maximum - 1


@settings(deadline=None, max_examples=60)
@given(plan=_plans())
def test_learning_rate_is_continuous_inside_a_phase(plan: RunPlan) -> None:
    for phase in plan.phases:
        rule, length = phase.learning_rate, phase.length.maximum or LIMIT
        rates = [rule.at(update) for update in range(length)]
        # Steepest slopes: 1/w in the warm-up, (1 - r) / (n - 1 - w) of a line, pi/2 times that of a cosine;
        # 1e-9 for rounding.
        decay = (1 - rule.final_ratio) / max(length - 1 - rule.warmup_updates, 1)
        slope = {"constant": 0.0, "linear": decay, "cosine": decay * math.pi / 2}[rule.kind]
        warmup = 1 / rule.warmup_updates if rule.warmup_updates else 0.0
        largest = rule.peak * max(slope, warmup) * (1 + 1e-9)
        assert all(abs(after - before) <= largest + 1e-12 * rule.peak for before, after in pairwise(rates))
        assert all(0.0 <= rate <= rule.peak for rate in rates)
        assert rates[max(rule.warmup_updates - 1, 0)] == pytest.approx(rule.peak, rel=1e-12)


class _Simulation:
    """The loop without a model: draws losses, skips and passes over the data; `interruptions` resumes it at
    some moments."""

    def __init__(self, plan: RunPlan, *, seed: int, updates_per_epoch: int, interruptions: float) -> None:
        self._plan = plan
        self._draw = random.Random(seed)  # one stream for what happens ...
        self._cut = random.Random(seed)  # ... and one for when it is interrupted
        self._updates_per_epoch = updates_per_epoch
        self._interruptions = interruptions
        self._scheduler = CurriculumScheduler(plan)
        self.clock = Clock()
        self.decisions: list[Decision] = []
        self.visited: list[tuple[int, int]] = []  # (phase, its length)

    def run(self) -> None:
        while True:
            decision = self._decision()
            if decision.action is Action.STAY:
                self._update()
                continue
            self.visited.append((self.clock.phase, self.clock.phase_updates))
            if decision.action is Action.FINISHED:
                return
            self.clock = self.clock.at_phase(self.clock.phase + 1)

    def _decision(self) -> Decision:
        if self._cut.random() < self._interruptions:
            saved, clock = json.dumps(self._scheduler.state_dict()), json.dumps(self.clock.to_dict())
            self._scheduler, self.clock = CurriculumScheduler(self._plan), Clock.from_dict(json.loads(clock))
            self._scheduler.load_state_dict(json.loads(saved))
        self.decisions.append(self._scheduler.decision(self.clock))
        return self.decisions[-1]

    def _update(self) -> None:
        needs_loss = self._scheduler.needs_loss(self.clock)
        epoch = (self.clock.phase_position + 1) // self._updates_per_epoch
        # A NaN now and then, but never as many in a row as the shortest patience: then the run would rightly
        # stop.
        loss = math.nan if self.clock.updates % 5 == 4 else self._draw.choice([1.0, 0.995, 0.9, 0.5, 2.0])
        if self._draw.random() < 0.1:
            self.clock = self.clock.after_skip(micro_batches=1, epoch=epoch)
            decision = self._scheduler.observe(self.clock, None)
        else:
            self.clock = self.clock.after_update(micro_batches=1, samples=1, epoch=epoch)
            decision = self._scheduler.observe(self.clock, loss if needs_loss else None)
        self.decisions.append(decision)


@settings(deadline=None, max_examples=60)
@given(plan=_plans(), seed=st.integers(0, 2**32), updates_per_epoch=st.integers(1, 15))
def test_a_run_visits_every_phase_once_within_its_bounds_interrupted_or_not(
    plan: RunPlan, seed: int, updates_per_epoch: int
) -> None:
    straight = _Simulation(plan, seed=seed, updates_per_epoch=updates_per_epoch, interruptions=0.0)
    straight.run()
    assert [phase for phase, _ in straight.visited] == list(range(len(plan.phases)))
    for phase, (_, length) in zip(plan.phases, straight.visited, strict=True):
        assert phase.length.minimum <= length <= (phase.length.maximum or math.inf)
    assert straight.clock.updates == sum(length for _, length in straight.visited)
    assert plan.total.minimum <= straight.clock.updates <= (plan.total.maximum or math.inf)

    for interruptions in (0.3, 1.0):
        cut = _Simulation(plan, seed=seed, updates_per_epoch=updates_per_epoch, interruptions=interruptions)
        cut.run()
        assert (cut.visited, cut.clock, cut.decisions) == (
            straight.visited,
            straight.clock,
            straight.decisions,
        )
