"""What the trace counts, against closed forms and against what autograd saves in a real forward on the
CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.tracing import trace
from aiprod_ds.planner.workload import WorkKind, Workload

ROWS, WIDTH = 64, 128


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm = nn.LayerNorm(4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = values + self.outer(functional.gelu(self.norm(self.inner(values))))
        return out


class _Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(count))

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values)
        return values


def _traced(module: nn.Module, rows: int = ROWS) -> Workload:
    shapes = on_meta(module)
    return trace(shapes, lambda: shapes(torch.ones(rows, WIDTH, device="meta")).square().mean())


def test_one_linear_layer_takes_what_its_shapes_say() -> None:
    found = _traced(nn.Linear(WIDTH, WIDTH, bias=False))

    element, whole = 4, ROWS * WIDTH * 4
    # Alive at the end of forward: the input, the output that the square keeps, and the loss (one allocation
    # of 512 bytes).
    assert found.saved_bytes == 2 * whole + 512
    # Forward and the gradient of the weight; nobody asks for the input's gradient.
    assert found.flops == 2 * 2 * ROWS * WIDTH * WIDTH
    assert (found.parameters, found.trained, found.trained_tensors) == (WIDTH**2, WIDTH**2, 1)
    assert found.curve[-1][0] == WIDTH**2
    matmuls = [work for work in found.work if work.kind is WorkKind.MATMUL]
    moved = sum(work.moved_bytes * work.count for work in matmuls)
    assert moved == 2 * (2 * whole + element * WIDTH**2)


def test_saved_bytes_are_what_autograd_saves_on_a_cpu() -> None:
    module = _Blocks(3)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = -(-storage.nbytes() // 512) * 512
        return tensor

    values = torch.ones(ROWS, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(values).square().mean()

    assert _traced(module).saved_bytes == sum(saved.values()) + 512  # and the loss itself
    assert loss.requires_grad


def test_recomputation_keeps_a_block_s_input_only() -> None:
    module = _Blocks(6)
    whole = _traced(module)
    set_recompute(module, enabled=True)
    recomputed = _traced(module)

    row = ROWS * WIDTH * 4
    assert recomputed.saved_bytes == (6 + 1) * row + 512  # six inputs, the last output, the loss
    assert recomputed.saved_bytes < whole.saved_bytes / 5
    again = (
        6 * 2 * ROWS * WIDTH * 4 * WIDTH
    )  # torch stops where all that backward needs is there: before the outer layer
    assert recomputed.flops == whole.flops + again
    # One block's activations come back while its gradients are computed.
    assert (
        recomputed.saved_bytes
        < recomputed.peak_bytes(bytes_per_gradient=0)
        < whole.peak_bytes(bytes_per_gradient=0)
    )


def test_every_second_block_recomputed_keeps_the_others() -> None:
    module = _Blocks(6)
    whole = _traced(module).saved_bytes
    set_recompute(module, enabled=True, every=2)
    some = _traced(module).saved_bytes
    set_recompute(module, enabled=True)
    every = _traced(module).saved_bytes
    assert some - every == pytest.approx((whole - every) / 2, rel=0.01)


def test_what_blocks_take_is_told_apart() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Blocks(3))
    shapes = on_meta(module)
    batch = torch.ones(ROWS, WIDTH, device="meta")
    blocks = list(repeated_blocks(shapes))
    found = trace(shapes, lambda: shapes(batch).square().mean(), blocks=blocks)
    row = ROWS * WIDTH * 4
    assert found.block_output_bytes == 3 * row
    # Without blocks: what the first layer hands on, and the loss.
    assert found.saved_bytes - found.block_saved_bytes == row + 512
    assert 0.9 < found.block_share < 1
    assert 0.8 < found.block_dispatched < 1
    # Of each block the weights of products, and biases with the norm's; outside a weight and a bias.
    assert (found.trained_tensors, found.flat_tensors) == (2 + 3 * 6, 2 + 3 * 2)
    plain = trace(shapes, lambda: shapes(batch).square().mean())
    assert (plain.block_saved_bytes, plain.block_share, plain.flat_tensors) == (0, 0.0, 20)
    assert plain.saved_bytes == found.saved_bytes


def test_gradients_that_stay_are_counted_where_they_are_there() -> None:
    found = _traced(_Blocks(2))
    without, held = found.peak_bytes(bytes_per_gradient=0), found.peak_bytes(bytes_per_gradient=1000)
    assert without == max(bytes_ for _, bytes_ in found.curve)
    assert held >= 1000 * found.trained
    assert [done for done, _ in found.curve] == sorted(done for done, _ in found.curve)


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, values_BLD: Tensor) -> Tensor:
        parts = self.project(self.norm(values_BLD)).unflatten(-1, (3, 4, WIDTH // 4)).transpose(1, 3)
        query, key, value = parts.unbind(2)
        return functional.scaled_dot_product_attention(query, key, value)


def test_fused_attention_keeps_rows_and_no_scores() -> None:
    length, sizes = 1024, []
    module = on_meta(_Attends())
    for tokens in (length, 2 * length):
        values = torch.ones(1, tokens, WIDTH, device="meta")
        found = trace(module, lambda values=values: module(values).square().mean())
        sizes.append(found.saved_bytes)
        attention = sum(work.flops * work.count for work in found.work if work.kind is WorkKind.ATTENTION)
        assert attention == 7 * 2 * tokens * tokens * WIDTH  # two products forward, five backward
    assert (
        sizes[1] < 2.01 * sizes[0]
    )  # linear in the length; the scores of 4 heads alone would be 4 * 2048^2 * 4 bytes
    assert sizes[1] < 4 * (2 * length) ** 2


def test_a_frozen_layer_has_no_gradient_of_its_weight() -> None:
    frozen = _Blocks(1)
    frozen.blocks[0].inner.requires_grad_(False)  # type: ignore[operator, union-attr]
    assert _traced(frozen).trained == _traced(_Blocks(1)).trained - 4 * WIDTH * WIDTH - 4 * WIDTH
    assert _traced(frozen).flops < _traced(_Blocks(1)).flops
