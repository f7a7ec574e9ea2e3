"""The checks of the curriculum: learning rates, where a run begins, and where its phases end, each against
the count or the formula that it follows from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiprod_ds.clock import Clock
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.scheduler import Action, CurriculumScheduler, Reason
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.validate.check import CheckFailedError, require_close, require_equal

_STRIDES = ModelStrides(spatial=8, temporal=2)
_MOST = 10_000  # updates of a check, so that a phase that never ends is told


def three_phases() -> str:
    """Checks bounds and learning rates of warm-up and cosine in each of three phases."""
    peaks, lengths, warmup, ratio = (1e-4, 5e-5, 2e-5), (101, 51, 31), 10, 0.1
    phases = [
        {**_phase(name, updates), "learning_rate": peak, "warmup_updates": warmup}
        for name, updates, peak in zip(("low", "medium", "high"), lengths, peaks, strict=True)
    ]
    plan = _plan(phases)
    starts = [phase.first_update for phase in plan.phases]
    require_equal("first updates of the phases", starts, [0, 101, 152])
    for phase, peak, updates in zip(plan.phases, peaks, lengths, strict=True):
        rate, middle = phase.learning_rate, warmup + (updates - 1 - warmup) // 2
        share = (middle - warmup) / (updates - 1 - warmup)
        cosine = peak * (ratio + (1 - ratio) * (1 + math.cos(math.pi * share)) / 2)
        for update, expected in (
            (0, peak / warmup),
            (warmup, peak),
            (middle, cosine),
            (updates - 1, ratio * peak),
        ):
            what = f"rate of update {update} of phase {phase.name}, over its highest"
            require_close(what, rate.at(update) / peak, expected / peak)
    return "bounds and rates of low, medium and high"


def scheduler_start() -> str:
    """Checks that a run begins in its first phase, which is not over."""
    scheduler = CurriculumScheduler(_plan([_phase("first", 3), _phase("second", 2)]))
    decision = scheduler.decision(Clock())
    require_equal("what to do", (decision.action, decision.reason), (Action.STAY, Reason.RUNNING))
    state = scheduler.state_dict()
    require_equal("phase", (state["phase"], state["phase_name"], state["seen_updates"]), (0, "first", 0))
    return "phase 0, nothing seen, nothing over"


def step_transitions() -> str:
    """Checks that phases of 3, 2 and 2 updates end there, also for a scheduler that is restored at every
    update."""
    plan = _plan([_phase("low", 3), _phase("medium", 2), _phase("high", 2)])
    ends = [
        (step.updates, step.reason) for step in _walk(plan, restores=True) if step.action is not Action.STAY
    ]
    require_equal("ends of the phases", ends, [(3, Reason.UPDATES), (5, Reason.UPDATES), (7, Reason.UPDATES)])
    return "phases of 3, 2 and 2 updates end at 3, 5 and 7, also when restored"


def plateau() -> str:
    """Checks that a constant loss ends a phase after the mean is filled and the patience is over, and that a
    loss that falls does not."""
    smoothing, patience, most = 0.5, 5, 40
    rule = {"patience_updates": patience, "smoothing": smoothing, "threshold": 1e-3}
    phases = [{**_phase("waits", most), "plateau": rule}]
    filled = math.ceil(1 / (1 - smoothing))
    constant = list(_walk(_plan(phases), losses=lambda _: 1.0))[-1]
    require_equal(
        "end with a constant loss", (constant.updates, constant.reason), (filled + patience, Reason.PLATEAU)
    )
    falling = list(_walk(_plan(phases), losses=lambda update: 0.9**update))[-1]
    require_equal("end with a falling loss", (falling.updates, falling.reason), (most, Reason.UPDATES))
    return f"a constant loss ends the phase after {filled} + {patience} updates, a falling one never"


def custom_phases() -> str:
    """Checks phases of a user's own: images before clips, several shapes, weights and rates that a phase
    sets."""
    images = {**_phase("images", 4), "duration": {"frames": 1}, "loss": {"kl_weight": 0.0}}
    shapes = [
        {"resolution": "32x48", "duration": {"frames": 5}, "global_batch_size": 8},
        {"resolution": "48x32", "duration": {"seconds": 0.5, "frame_rate_hz": 16.0}, "global_batch_size": 4},
    ]
    mixed = {
        "name": "both_ways",
        "buckets": shapes,
        "updates": 3,
        "learning_rate": 1e-4,
        "schedule": "constant",
    }
    plan = _plan([images, mixed], ranks=2)
    first, second = plan.phases
    require_equal("frames of the images", first.buckets[0].frames, 1)
    require_equal("weight of the KL", first.loss_weights["kl_weight"], 0.0)
    found = [
        (bucket.height, bucket.width, bucket.frames, bucket.micro_batch_size) for bucket in second.buckets
    ]
    require_equal("shapes and micro-batches on 2 ranks", found, [(32, 48, 5, 4), (48, 32, 9, 2)])
    require_close("rate of the last update", second.learning_rate.at(2), 1e-4, tolerance=1e-9)
    return "images, two shapes, seconds and a weight of one phase"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    updates: int
    action: Action
    reason: Reason


def _walk(plan: RunPlan, *, losses: Any = None, restores: bool = False) -> Iterator[_Step]:
    """Yields what the scheduler says after each update of a run that only counts."""
    scheduler, clock = CurriculumScheduler(plan), Clock()
    while clock.updates < _MOST:
        needs_loss = scheduler.needs_loss(clock)
        clock = clock.after_update(micro_batches=1, samples=2, epoch=0)
        loss = losses(clock.updates) if needs_loss else None
        decision = scheduler.observe(clock, loss)
        yield _Step(updates=clock.updates, action=decision.action, reason=decision.reason)
        if decision.action is Action.FINISHED:
            return
        if decision.action is Action.NEXT_PHASE:
            clock = clock.at_phase(clock.phase + 1)
        if restores:
            state, scheduler = scheduler.state_dict(), CurriculumScheduler(plan)
            scheduler.load_state_dict(state)
    raise CheckFailedError(f"the run: must end, got {_MOST} updates and no end")


def _phase(name: str, updates: int) -> dict[str, Any]:
    return {
        "name": name,
        "resolution": "32x32",
        "duration": {"frames": 5},
        "global_batch_size": 2,
        "updates": updates,
        "learning_rate": 1e-3,
    }


def _plan(phases: Sequence[Mapping[str, Any]], *, ranks: int = 1) -> RunPlan:
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": "runs/validate",
            "model": {"source": "AutoencoderKLLTXVideo"},
            "data": {"train": "clips"},
            "curriculum": {"phases": list(phases)},
        }
    )
    return plan_run(config, world_size=ranks, strides=_STRIDES)
