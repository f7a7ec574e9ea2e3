"""Captured passes, on the CPU: the way in which values go in and gradients come out, without graphs."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.captured import CapturedLoss, GraphPool
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.errors import EngineError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.frozen(self.used(x).tanh())
        return found


def _engine(*, accumulation: int) -> LocalEngine:
    names = ("used.weight", "used.bias", "unused.weight", "unused.bias")
    return LocalEngine(
        Small(),
        [ParameterGroup(names=names, is_decayed=False)],
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings({"zero_optimization": {"stage": 1}}, "test"),
        micro_batch_size=2,
        accumulation=accumulation,
    )


def _loss(engine: LocalEngine, x: Tensor) -> dict[str, Tensor]:
    error = (engine(x) - x).square()
    return {"total": error.mean(), "loss/worst": error.detach().max()}


def _captured(engine: LocalEngine) -> CapturedLoss:
    def loss(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _loss(engine, tensors["x"])

    return engine.captured_loss(loss, {"x": torch.zeros(2, 4)})


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_is_the_same_bit_for_bit(accumulation: int) -> None:
    one, other = _engine(accumulation=accumulation), _engine(accumulation=accumulation)
    captured = _captured(other)
    for update in range(3):
        for engine in (one, other):
            engine.set_learning_rate(0.1)
        for index in range(accumulation):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * update + index))
            plain = _loss(one, x)
            found = captured({"x": x}, is_last=index == accumulation - 1)
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[name], plain[name]) for name in plain)
            one.backward(plain["total"])
            other.backward(found["total"])
            result, expected = other.step(), one.step()
        assert result is not None
        assert expected is not None
        assert float(result.gradient_norm) == float(expected.gradient_norm) > 0
    for state, same in zip(one.parameter_states(), other.parameter_states(), strict=True):
        assert torch.equal(state.value, same.value)


def test_values_stay_when_the_next_micro_batch_comes() -> None:
    captured = _captured(_engine(accumulation=1))
    first = captured({"x": torch.ones(2, 4)}, is_last=True)
    kept = float(first["loss/worst"])
    captured({"x": 3 * torch.ones(2, 4)}, is_last=True)
    assert float(first["loss/worst"]) == kept


def test_a_weight_that_was_moved_is_an_error_by_its_name() -> None:
    engine = _engine(accumulation=1)
    captured = _captured(engine)
    weight = engine.module.get_parameter("used.weight")
    weight.data = weight.data.clone()
    with pytest.raises(EngineError, match=r"performance\.graphs: weights must stay in place, got a new used"):
        captured({"x": torch.ones(2, 4)}, is_last=True)


def test_a_pool_whose_last_graph_is_gone_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter(["first", "second"])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pool = GraphPool()
    assert [pool.take(), pool.take()] == ["first", "first"]
    pool.give_back()
    assert pool.take() == "first", "one graph is left"
    pool.give_back()
    pool.give_back()
    assert pool.take() == "second"
