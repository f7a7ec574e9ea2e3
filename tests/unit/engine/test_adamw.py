"""AdamW that clips while it updates: against torch's own AdamW and clipping, in each of its forms."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aiprod_ds.engine.adamw import LateNumber, OnePassAdamW, global_norm

SHAPES = ((3, 5), (7,))
PADDING = 2
CPU = torch.device("cpu")


def _values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _flat(values: list[Tensor]) -> Tensor:
    return torch.cat([*(value.flatten() for value in values), torch.zeros(PADDING)])


def _optimizer(master: Tensor, *, fused: bool) -> OnePassAdamW:
    made = OnePassAdamW([{"params": [master]}], betas=(0.9, 0.99), epsilon=1e-8, fused=fused)
    made.param_groups[0].update(lr=0.1, weight_decay=0.1)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_it_updates_as_torch_does_after_clipping(
    *, fused: bool, clip_norm: float | None, dtype: torch.dtype
) -> None:
    """fp32 rounding: torch multiplies by a quotient where this divides."""
    theirs = _values(0)
    own, weights = _flat(theirs), torch.zeros(_flat(theirs).numel(), dtype=dtype)
    optimizer = _optimizer(own, fused=fused)
    expected = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for update in range(3):
        gradients = [value.to(dtype) for value in _values(update + 1)]
        for other, gradient in zip(theirs, gradients, strict=True):
            other.grad = gradient.float()
        optimizer.expect(global_norm(gradients, CPU), clip_norm=clip_norm)
        optimizer.update(0, gradients, weights)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        expected.step()
    torch.testing.assert_close(own, _flat(theirs), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights, own.to(dtype))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_changes_and_counts_nothing(*, fused: bool, bad: float) -> None:
    own = _flat(_values(0))
    weights = own.clone()
    optimizer = _optimizer(own, fused=fused)
    for gradients in (_values(1), [torch.full(shape, bad) for shape in SHAPES], _values(2)):
        before, state = own.clone(), optimizer.state.get(own, {})
        kept = {name: value.clone() for name, value in state.items()}
        is_finite = bool(torch.isfinite(gradients[0]).all())
        optimizer.expect(global_norm(gradients, CPU), clip_norm=1.0)
        optimizer.update(0, gradients, weights)
        assert torch.equal(own, before) is not is_finite
        assert torch.equal(weights, own)
        assert is_finite or all(torch.equal(state[name], value) for name, value in kept.items())
    assert float(optimizer.state[own]["step"]) == 2.0


def test_each_group_is_updated_by_itself() -> None:
    masters = [_flat(_values(0)), _flat(_values(5))]
    optimizer = OnePassAdamW(
        [{"params": [master]} for master in masters], betas=(0.9, 0.99), epsilon=1e-8, fused=False
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    kept = masters[0].clone()
    optimizer.expect(torch.tensor(1.0), clip_norm=None)
    optimizer.update(1, _values(1), torch.zeros_like(masters[1]))
    assert torch.equal(masters[0], kept)
    assert not torch.equal(masters[1], _flat(_values(5)))
    assert len(optimizer.param_groups) == 2


def test_the_kernel_computes_what_torch_does() -> None:
    """By Triton's interpreter, which reads its switch when Triton is imported: in a process of its own. It
    cuts 16-bit results where a GPU rounds them, so they are compared on GPUs alone."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_adamw.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [70, 80, 90])
def test_the_kernel_compiles_for_every_card_and_moves_16_bytes_at_once(capability: int) -> None:
    triton = pytest.importorskip("triton")
    kernel = pytest.importorskip("aiprod_ds.engine.kernels.adamw")._update
    tensors = ("gradient", "master", "first", "second", "weight")
    signature = {name: "*fp32" if name in {*tensors, "numbers"} else "fp32" for name in kernel.arg_names}
    signature |= {"gradient": "*bf16", "weight": "*bf16", "size": "i32", "BLOCK": "constexpr"}
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*tensors, "size")}
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs={"BLOCK": 1024}, attrs=divisible
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target).asm["ptx"]
    assert found.count("ld.global.v4.b32") >= 3
    assert "st.global.b32" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_of_all_tensors_together(dtype: torch.dtype) -> None:
    shards = [value.to(dtype) for value in _values(0)]
    exact = torch.cat([shard.double().flatten() for shard in shards]).norm()
    found = global_norm(shards, CPU)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-6)
    assert float(global_norm([], CPU)) == 0.0


def test_a_number_of_the_cpu_is_there_at_once() -> None:
    assert LateNumber(torch.tensor(2.5)).value() == 2.5
