"""AdamW that clips while it updates: against torch's own AdamW and clipping, in both of its forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aiprod_ds.engine.adamw import LateNumber, OnePassAdamW, global_norm

SHAPES = ((3, 5), (7,))


def _values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _optimizer(values: list[Tensor], *, fused: bool) -> OnePassAdamW:
    made = OnePassAdamW([{"params": values}], betas=(0.9, 0.99), epsilon=1e-8, fused=fused)
    made.param_groups[0].update(lr=0.1, weight_decay=0.1)
    return made


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_it_updates_as_torch_does_after_clipping(*, fused: bool, clip_norm: float | None) -> None:
    """fp32 rounding: torch multiplies by a quotient where this divides."""
    own, theirs = _values(0), _values(0)
    optimizer = _optimizer(own, fused=fused)
    expected = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for update in range(3):
        for value, other, gradient in zip(own, theirs, _values(update + 1), strict=True):
            value.grad, other.grad = gradient.clone(), gradient.clone()
        norm = global_norm([value.grad for value in own if value.grad is not None], torch.device("cpu"))
        optimizer.expect(norm, clip_norm=clip_norm)
        optimizer.step()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        expected.step()
    for value, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_changes_and_counts_nothing(*, fused: bool, bad: float) -> None:
    values = _values(0)
    optimizer = _optimizer(values, fused=fused)
    device = torch.device("cpu")
    for gradients in (_values(1), [torch.full(shape, bad) for shape in SHAPES], _values(2)):
        before = [value.clone() for value in values]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient.clone()
        optimizer.expect(global_norm(gradients, device), clip_norm=1.0)
        optimizer.step()
        is_same = all(torch.equal(value, old) for value, old in zip(values, before, strict=True))
        assert is_same is not bool(torch.isfinite(gradients[0]).all())
        if is_same:
            assert [float(state["step"]) for state in optimizer.state.values()] == steps
            after = [state["exp_avg"] for state in optimizer.state.values()]
            assert all(torch.equal(one, other) for one, other in zip(after, moments, strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_of_all_tensors_together(dtype: torch.dtype) -> None:
    shards = [value.to(dtype) for value in _values(0)]
    exact = torch.cat([shard.double().flatten() for shard in shards]).norm()
    found = global_norm(shards, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
    assert float(global_norm([], torch.device("cpu"))) == 0.0


def test_a_number_of_the_cpu_is_there_at_once() -> None:
    assert LateNumber(torch.tensor(2.5)).value() == 2.5
