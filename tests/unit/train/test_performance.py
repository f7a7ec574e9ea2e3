"""What `performance` chooses on which GPU, why, and for how long torch is set."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.run import PerformanceConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine.compiled import compiled_shapes
from aiprod_ds.errors import ConfigError
from aiprod_ds.testing.plans import phase_plan
from aiprod_ds.train.performance import Performance, choose_performance

V100, A100, H200 = (7, 0), (8, 0), (9, 0)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.utils.weight_norm(nn.Conv1d(2, 2, 1)) for _ in range(2)]
        self.blocks = nn.ModuleList(convolutions)


def _choose(
    capability: tuple[int, int] | None,
    *,
    module: nn.Module | None = None,
    stage: int = 1,
    precision: str = "bf16",
    is_flat: bool = False,
    can_capture: bool = True,
    **asked: Any,
) -> Performance:
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    return choose_performance(
        PerformanceConfig(**asked),
        module or Blocks(),
        capability=capability,
        settings=parse_deepspeed_settings(settings, where="test"),
        is_flat=is_flat,
        can_capture=can_capture,
        where="c.yaml",
    )


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, (False, False, False)),
        ((6, 1), (False, True, False)),
        (V100, (True, True, False)),
        (A100, (True, True, False)),
        (H200, (True, True, True)),
    ],
)
def test_what_auto_takes(capability: tuple[int, int] | None, expected: tuple[bool, bool, bool]) -> None:
    found = _choose(capability)
    assert (found.compiles_blocks, found.captures_passes, found.has_cudnn_first) == expected
    assert [reason.split()[0] for reason in found.reasons] == ["compile", "graphs", "attention"]
    assert all(": " in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("module", "stage", "precision", "why"),
    [
        (nn.Linear(2, 2), 1, "bf16", "Linear has no repeated blocks"),
        (Blocks(), 3, "bf16", "ZeRO-3 without flat parameters"),
        pytest.param(
            Normed,
            1,
            "fp16",
            "weight normalisation",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm"),
        ),
    ],
)
def test_what_cannot_be_compiled_is_left_out_by_auto_and_refused_by_name(
    module: Any, stage: int, precision: str, why: str
) -> None:
    module = module() if isinstance(module, type) else module
    found = _choose(H200, module=module, stage=stage, precision=precision)
    assert not found.compiles_blocks
    assert why in found.reasons[0]
    with pytest.raises(ConfigError, match=f"c.yaml: performance.compile: cannot be blocks, got .*{why}"):
        _choose(H200, module=module, stage=stage, precision=precision, compile="blocks")


def test_flat_parameters_let_blocks_compile_under_zero_3() -> None:
    assert _choose(H200, stage=3, is_flat=True).compiles_blocks


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weight_normed_blocks_compile_in_bf16() -> None:
    assert _choose(H200, module=Normed()).compiles_blocks


def test_what_is_asked_for_by_name_is_taken() -> None:
    assert _choose(None, compile="blocks").compiles_blocks
    assert not _choose(H200, compile="off").compiles_blocks
    assert _choose(A100, attention="cudnn").has_cudnn_first
    assert not _choose(H200, attention="torch").has_cudnn_first


@pytest.mark.parametrize("capability", [None, H200])
def test_graphs_are_taken_and_left_out_by_name(capability: tuple[int, int] | None) -> None:
    assert _choose(capability, graphs="passes").captures_passes
    assert not _choose(capability, graphs="off").captures_passes


@pytest.mark.parametrize(
    ("given", "why"),
    [({"stage": 3}, "ZeRO-3 moves weights"), ({"can_capture": False}, "the trainer's loss draws noise")],
)
def test_graphs_are_refused_where_they_would_compute_something_else(given: dict[str, Any], why: str) -> None:
    assert not _choose(H200, **given).captures_passes
    with pytest.raises(ConfigError, match=f"c.yaml: performance.graphs: cannot be passes, got {why}"):
        _choose(H200, graphs="passes", **given)


@pytest.mark.parametrize("capability", [None, V100])
def test_cudnn_is_refused_where_it_is_not(capability: tuple[int, int] | None) -> None:
    with pytest.raises(ConfigError, match=r"c.yaml: performance.attention: cudnn needs .*8\.0 or newer, got"):
        _choose(capability, attention="cudnn")


def test_torch_is_set_for_the_run_alone() -> None:
    def order() -> list[Any]:
        return list(torch._C._get_sdp_priority_order())

    plan = RunPlan(phases=(phase_plan(index=0, updates=1),), world_size=1)
    before, limit = order(), torch._dynamo.config.recompile_limit
    with suppress(KeyError), _choose(H200).active(plan):
        assert order()[0] == SDPBackend.CUDNN_ATTENTION.value
        assert torch._dynamo.config.recompile_limit > limit
        raise KeyError
    assert order() == before
    assert torch._dynamo.config.recompile_limit == limit


def test_blocks_are_prepared_and_put_back() -> None:
    module = Blocks()
    plain = type(module.blocks[0])
    _choose(None, compile="blocks").prepare(module)
    assert type(module.blocks[0]) is not plain
    _choose(None, compile="off").prepare(module)
    assert type(module.blocks[0]) is plain


def test_determinism_is_set_for_the_run_alone() -> None:
    plan = RunPlan(phases=(phase_plan(index=0, updates=1),), world_size=1)
    chosen = _choose(None, deterministic=True)
    assert chosen.reasons[-1] == "deterministic kernels: as configured"
    with suppress(KeyError), chosen.active(plan):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("compiles", "why"), [("blocks", "as configured"), ("off", "without effect")])
def test_a_budget_of_memory_is_told_with_its_effect(compiles: str, why: str) -> None:
    chosen = _choose(None, compile=compiles, activation_memory_budget=0.5)
    assert why in chosen.reasons[-1]


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.sin(self.layer(x)) * torch.tanh(x)
        return x


@pytest.mark.slow
def test_a_smaller_budget_keeps_fewer_activations_and_the_gradients() -> None:
    """The same kernels in another order of calls: bit for bit."""
    held, gradients = [], []
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        module = Wide()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, into: list[int] = sizes) -> torch.Tensor:
            into.append(tensor.numel())
            return tensor

        with compiled_shapes(1, budget=budget):
            compiled = torch.compile(module, backend="aot_eager_decomp_partition", dynamic=False)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                total = compiled(x).square().mean()
            total.backward()
        assert module.layer.weight.grad is not None
        held.append(sum(sizes))
        gradients.append(module.layer.weight.grad.clone())
    assert held[1] < held[0]
    assert torch.equal(*gradients)
