"""What a phase sets once when it begins: activation checkpointing, weight decay, moments; on the local
engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.errors import ConfigError
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.train.phase_change import begin_phase, check_recompute

UPDATES_BEFORE = 3


class Blocks(nn.Module):
    """Counts how often its blocks run forward: twice an update where they are recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, value: Tensor) -> Tensor:
        for block in self.blocks:
            value = block(value)
        return value


class Block(nn.Module):
    forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        Block.forwards += 1
        mixed: Tensor = torch.tanh(self.linear(value))
        return mixed


PHASE = phase_plan(index=1, updates=9, weight_decay=0.5)
FIRST_MOMENT = Clock(updates=UPDATES_BEFORE, phase=1)
INSIDE = Clock(updates=UPDATES_BEFORE + 2, phase=1, phase_updates=2)
AFTER_A_SKIP = Clock(updates=UPDATES_BEFORE, phase=1, phase_skipped=1, skipped_updates=1)


def _engine() -> LocalEngine:
    torch.manual_seed(0)
    module = Blocks()
    names = {
        is_decayed: tuple(n for n, p in module.named_parameters() if (p.dim() > 1) is is_decayed)
        for is_decayed in (True, False)
    }
    groups = [ParameterGroup(names=names[is_decayed], is_decayed=is_decayed) for is_decayed in (True, False)]
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 1}}, where="test")
    engine = LocalEngine(
        module, groups, optimizer=OptimizerConfig(), settings=settings, micro_batch_size=2, accumulation=1
    )
    for _ in range(UPDATES_BEFORE):
        _update(engine, rate=0.1)
    return engine


def _update(engine: LocalEngine, *, rate: float) -> None:
    engine.set_learning_rate(rate)
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()


def _begin(engine: LocalEngine, clock: Clock, *, default: bool = False, **changes: Any) -> None:
    begin_phase(engine, engine.module, replace(PHASE, **changes), clock, recompute_default=default)


def _moments(engine: LocalEngine) -> list[Tensor]:
    return [tensor for state in engine.parameter_states() for _, tensor in sorted(state.optimizer.items())]


@pytest.mark.parametrize(("policy", "factor"), [("keep", 1.0), ("decay", 0.25), ("reset", 0.0)])
def test_moments_are_scaled_when_the_phase_begins(policy: str, factor: float) -> None:
    engine = _engine()
    before = _moments(engine)
    _begin(engine, FIRST_MOMENT, moments=policy, moment_scale=factor)
    assert all(
        torch.equal(after, moment * factor) for after, moment in zip(_moments(engine), before, strict=True)
    )
    assert {state.step for state in engine.parameter_states()} == {0 if policy == "reset" else UPDATES_BEFORE}


@pytest.mark.parametrize("clock", [INSIDE, AFTER_A_SKIP], ids=["two updates in", "after a skipped update"])
def test_a_resume_inside_the_phase_leaves_the_moments_alone(clock: Clock) -> None:
    engine = _engine()
    before = _moments(engine)
    _begin(engine, clock, moments="reset", moment_scale=0.0)
    assert all(torch.equal(after, moment) for after, moment in zip(_moments(engine), before, strict=True))


@pytest.mark.parametrize("clock", [FIRST_MOMENT, INSIDE], ids=["begin", "resume"])
def test_matrices_are_decayed_by_the_phase_and_vectors_never(clock: Clock) -> None:
    """Oracle: with gradient zero and fresh moments AdamW's update is weight *= 1 - rate * decay."""
    engine = _engine()
    engine.scale_moments(0.0)
    _begin(engine, clock)
    before = {state.name: state.value for state in engine.parameter_states()}
    engine.set_learning_rate(0.1)
    engine.backward(engine(torch.ones(2, 4)).sum() * 0.0)
    engine.step()
    for state in engine.parameter_states():
        kept = 1 - 0.1 * PHASE.weight_decay if state.value.dim() > 1 else 1.0
        torch.testing.assert_close(state.value, before[state.name] * kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("own", "default", "expected"), [(None, False, 2), (None, True, 4), (True, False, 4), (False, True, 2)]
)
def test_blocks_are_recomputed_as_the_phase_or_else_the_settings_say(
    own: bool | None, default: bool, expected: int
) -> None:
    engine = _engine()
    _begin(engine, FIRST_MOMENT, default=default, activation_checkpointing=own)
    Block.forwards = 0
    _update(engine, rate=0.1)
    assert Block.forwards == expected


def test_a_model_without_blocks_is_refused_before_the_run() -> None:
    plan = RunPlan(
        phases=(replace(PHASE, index=0), replace(PHASE, activation_checkpointing=True)), world_size=1
    )
    with pytest.raises(
        ConfigError, match=r"c.yaml: curriculum.phases\[1\]: activation_checkpointing: needs repeated blocks"
    ):
        check_recompute(nn.Linear(2, 2), plan, default=False, source="c.yaml")


def test_the_check_leaves_the_model_as_it_was() -> None:
    module = Blocks()
    check_recompute(module, RunPlan(phases=(PHASE,), world_size=1), default=True, source="c.yaml")
    Block.forwards = 0
    module(torch.ones(2, 4)).sum().backward()
    assert Block.forwards == 2
