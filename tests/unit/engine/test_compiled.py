"""Compiled blocks compute what plain ones compute, keep their names, and are compiled once for each shape."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from aiprod_ds import progress
from aiprod_ds.engine.compiled import compiled_shapes, leave_unaligned_eager, set_compiled
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.report.progress_line import shown_on

# torch.compile looks at `.grad` of what it is given, and hides the warning from users only.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, value: Tensor) -> Tensor:
        mixed: Tensor = value + torch.tanh(self.linear(self.norm(value)))
        return mixed


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, value: Tensor) -> Tensor:
        value = self.into(value)  # so that the first block's input has a gradient too, as in a model
        for block in self.blocks:
            value = block(value)
        return value


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _row() -> Row:
    torch.manual_seed(0)
    return Row()


def _gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    module(value).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_every_gradient_is_that_of_the_plain_blocks(is_recomputed: bool) -> None:
    value = torch.randn(4, 5, 8)
    plain, row = _gradients(_row(), value), _row()
    set_compiled(row.blocks, enabled=True, backend="aot_eager")
    set_recompute(row, enabled=is_recomputed)
    found = _gradients(row, value)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():  # the same kernels in the same order: aot_eager fuses nothing
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)
        assert gradient.abs().max() > 0


@pytest.mark.slow
def test_one_compilation_a_shape_serves_all_blocks_also_between_evaluations() -> None:
    row, compiled = _row(), []

    def counting(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(
            [node.meta["example_value"].shape for node in graph.graph.nodes if node.op == "call_function"][-1]
        )
        return graph

    torch._dynamo.register_backend(counting, name="counting")
    set_compiled(row.blocks, enabled=True, backend="counting")
    with compiled_shapes(2):
        with torch.no_grad():
            row(torch.randn(1, 5, 8))  # a held-out clip, before training
        for size in (4, 2, 4, 2):
            row(torch.randn(size, 5, 8)).mean().backward()
        with torch.no_grad():
            row(torch.randn(1, 5, 8))
    assert compiled == [(1, 5, 8), (4, 5, 8), (2, 5, 8)], "static shapes, each once"


@pytest.mark.slow
def test_names_and_classes_come_back() -> None:
    row = _row()
    keys, kind = list(row.state_dict()), type(row.blocks[0])
    set_compiled(row.blocks, enabled=True, backend="aot_eager")
    set_compiled(row.blocks, enabled=True, backend="aot_eager")
    assert list(row.state_dict()) == keys
    assert isinstance(row.blocks[0], kind)
    assert type(row.blocks[0]) is not kind
    twin = copy.deepcopy(row)
    twin.blocks[0].linear.weight.data.zero_()
    value = torch.randn(1, 2, 8)
    assert not torch.equal(twin(value), row(value)), "a copy calls itself"
    set_compiled(row.blocks, enabled=False)
    assert type(row.blocks[0]) is kind


def test_limits_are_raised_for_the_run_alone() -> None:
    before = torch._dynamo.config.recompile_limit
    with compiled_shapes(50):
        assert torch._dynamo.config.recompile_limit >= 200
    assert torch._dynamo.config.recompile_limit == before


def test_compiling_shows_progress_and_its_callbacks_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process group of ranks the main one alone has a display; the others compile without a word."""
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.01)
    log = io.StringIO()

    def slow(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        time.sleep(0.2)
        return graph.forward

    row = _row()
    with compiled_shapes(1), shown_on(Console(file=log)):
        set_compiled(row.blocks, enabled=True, backend=slow)
        row(torch.randn(2, 8))
        first = log.getvalue()
        row(torch.randn(2, 8))
    assert first.splitlines()[0].startswith("compiling kernels for a new shape")
    assert log.getvalue() == first  # nothing is compiled twice
    handler = torch._dynamo.callback.callback_handler
    assert (handler.start_callbacks, handler.end_callbacks) == ([], [])


def test_blocks_whose_weights_are_not_aligned_stay_eager() -> None:
    row = _row()
    set_compiled(row.blocks, enabled=True, backend="aot_eager")
    assert leave_unaligned_eager(row) == ()
    bias = row.blocks[1].linear.bias  # type: ignore[union-attr]
    bias.data = torch.cat([torch.zeros(1), bias.data])[1:]
    assert bias.data_ptr() % 16 == 4
    assert leave_unaligned_eager(row) == (
        "blocks.1 is not compiled: linear.bias is not at a multiple of 16 bytes",
    )
    assert [type(block) is Block for block in row.blocks] == [False, True, False]
