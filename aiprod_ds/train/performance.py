"""How a run computes: which of the choices that change no result beyond rounding it takes, and why.

Owns the rules behind `performance: auto` and the time for which torch is set by them. A choice holds from the
first update to the last resume's, because a captured or compiled kernel adds in another order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.run import PerformanceConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine.compiled import compiled_shapes, set_compiled
from aiprod_ds.engine.kernels.fp8 import CAPABILITY, Recipe, set_fp8, why_no_torchao
from aiprod_ds.engine.recompute import repeated_blocks
from aiprod_ds.errors import ConfigError

_LOG = logging.getLogger(__name__)
_TRITON_FROM, _CUDNN_FROM, _HOPPER = (7, 0), (8, 0), 9
_PARTITIONED = 3
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """What was chosen.

    Attributes:
        compiles_blocks: Whether the repeated blocks run compiled.
        captures_passes: Whether forward and backward pass are replayed as CUDA graphs in phases that can be.
        has_cudnn_first: Whether attention takes cuDNN's kernel wherever it can; otherwise torch chooses.
        activation_memory_budget: Share of its activations that a compiled block keeps, in [0, 1].
        fp8: How linear layers multiply in 8 bits; None if they do not.
        is_deterministic: Whether kernels whose sums depend on chance are left out, or refused.
        reasons: One line a choice, `choice: why`, for plan and report.
    """

    compiles_blocks: bool
    captures_passes: bool
    has_cudnn_first: bool
    activation_memory_budget: float
    fp8: Recipe | None
    is_deterministic: bool
    reasons: tuple[str, ...]

    def prepare(self, module: nn.Module) -> None:
        """Makes the blocks of `module` run as chosen; call it before an engine takes the module."""
        blocks = list(repeated_blocks(module))
        set_compiled(blocks, enabled=False)
        layers = set_fp8(blocks, recipe=self.fp8)
        if self.fp8 is not None:
            _LOG.info("fp8 recipe=%s layers=%d", self.fp8, layers)
        set_compiled(blocks, enabled=self.compiles_blocks)

    @contextmanager
    def active(self, plan: RunPlan, *, num_sampled_shapes: int = 0) -> Iterator[None]:
        """Sets torch as chosen while the block runs: backward passes too, which may recompute attention.

        Args:
            num_sampled_shapes: Of the unit: without room for them, torch would stop compiling training's own.
        """
        buckets = sum(len(phase.buckets) for phase in plan.phases)
        with ExitStack() as stack:
            # One more for the clip that is evaluated.
            shapes = buckets + 1 + num_sampled_shapes
            stack.enter_context(compiled_shapes(shapes, budget=self.activation_memory_budget))
            if self.has_cudnn_first:
                stack.enter_context(sdpa_kernel(_CUDNN_FIRST, set_priority=True))
            if self.is_deterministic:
                stack.enter_context(_deterministic())
            yield


def choose_performance(
    config: PerformanceConfig,
    module: nn.Module,
    *,
    capability: tuple[int, int] | None,
    settings: DeepSpeedSettings,
    is_flat: bool,
    can_capture: bool,
    where: str,
) -> Performance:
    """Returns what a run computes with.

    Args:
        config: What was asked for; `auto` is decided here.
        module: May be on the meta device.
        capability: Compute capability of the GPU; None for the CPU.
        settings: Of the engine: ZeRO stage and precision.
        is_flat: Whether the weights of blocks stand in flat parameters; ZeRO-3 gathers those beforehand.
        can_capture: Whether the trainer's loss can be a CUDA graph.
        where: How messages name the configuration.

    Raises:
        ConfigError: If something is asked for by name that cannot be.
    """
    against = _against_compiling(module, settings, is_flat=is_flat)
    compile_by, compile_why = _compiling(config.compile, capability, against, where)
    against = _against_graphs(settings, can_capture)
    graphs_by, graphs_why = _graphs(config.graphs, capability, against, where)
    attention_by, attention_why = _attention(config.attention, capability, where)
    return Performance(
        compiles_blocks=compile_by == "blocks",
        captures_passes=graphs_by == "passes",
        has_cudnn_first=attention_by == "cudnn",
        activation_memory_budget=config.activation_memory_budget,
        fp8=_fp8(config.fp8, capability, settings, has_compiled=compile_by == "blocks", where=where),
        is_deterministic=config.deterministic,
        reasons=(
            f"compile {compile_by}: {compile_why}",
            f"graphs {graphs_by}: {graphs_why}",
            f"attention {attention_by}: {attention_why}",
            *_further(config, has_compiled=compile_by == "blocks"),
        ),
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _further(config: PerformanceConfig, *, has_compiled: bool) -> Iterator[str]:
    if config.activation_memory_budget < 1:
        why = "as configured" if has_compiled else "without effect, because blocks are not compiled"
        yield f"activation memory budget {config.activation_memory_budget:g}: {why}"
    if config.fp8 != "off":
        yield f"fp8 {config.fp8}: as configured"
    if config.deterministic:
        yield "deterministic kernels: as configured"


def _as_asked(key: str, asked: str, against: str | None, where: str) -> tuple[str, str]:
    """Returns what was asked for by name, unless something stands against it."""
    if asked != "off" and against is not None:
        raise ConfigError(f"{where}: performance.{key}: cannot be {asked}, got {against}. Set auto or off.")
    return asked, "as configured"


def _compiling(
    asked: str, capability: tuple[int, int] | None, against: str | None, where: str
) -> tuple[str, str]:
    if asked != "auto":
        return _as_asked("compile", asked, against, where)
    if capability is None:
        return "off", "on a CPU compiling takes longer than it saves in a short run"
    if capability < _TRITON_FROM:
        return "off", f"Triton needs compute capability 7.0, the GPU has {capability[0]}.{capability[1]}"
    return ("off", against) if against is not None else ("blocks", "each shape is compiled once")


def _against_compiling(module: nn.Module, settings: DeepSpeedSettings, *, is_flat: bool) -> str | None:
    """Returns why the blocks cannot be compiled; None if they can."""
    blocks = list(repeated_blocks(module))
    if not blocks:
        return f"{type(module).__name__} has no repeated blocks"
    if settings.zero_stage == _PARTITIONED and not is_flat:
        return "ZeRO-3 without flat parameters gathers weights inside of them"
    if settings.precision == "fp16" and any(
        name.endswith("weight_g") for block in blocks for name, _ in block.named_parameters()
    ):
        return "the backward pass of weight normalisation does not compile in fp16"  # torch 2.11
    return None


def _graphs(
    asked: str, capability: tuple[int, int] | None, against: str | None, where: str
) -> tuple[str, str]:
    if asked != "auto":
        return _as_asked("graphs", asked, against, where)
    if capability is None:
        return "off", "a CPU has none"
    return (
        ("off", against) if against is not None else ("passes", "each shape is captured once, if it is small")
    )


def _against_graphs(settings: DeepSpeedSettings, can_capture: bool) -> str | None:
    """Returns why no pass can be captured; None if they can."""
    if settings.zero_stage == _PARTITIONED:
        return "ZeRO-3 moves weights while they are computed with"
    if not can_capture:
        return "the trainer's loss draws noise or reads numbers while it is computed"
    return None


def _attention(asked: str, capability: tuple[int, int] | None, where: str) -> tuple[str, str]:
    has_cudnn = capability is not None and capability >= _CUDNN_FROM
    if asked == "cudnn":
        if not has_cudnn:
            raise ConfigError(
                f"{where}: performance.attention: cudnn needs a GPU of compute capability 8.0 or newer, got "
                f"{'none' if capability is None else f'{capability[0]}.{capability[1]}'}. Set auto."
            )
        return "cudnn", "as configured"
    if asked == "torch":
        return "torch", "as configured"
    if capability is not None and capability[0] == _HOPPER:
        return "cudnn", "on compute capability 9.x it is a third faster than FlashAttention-2"
    return "torch", "torch's own order is the fastest known here"


def _fp8(
    asked: str,
    capability: tuple[int, int] | None,
    settings: DeepSpeedSettings,
    *,
    has_compiled: bool,
    where: str,
) -> Recipe | None:
    if asked == "off":
        return None
    against: str | None
    if capability is None or capability < CAPABILITY:
        against = "it needs a GPU of compute capability 8.9 or newer"
    elif settings.precision != "bf16":
        against = f"it needs bf16, the precision is {settings.precision}"
    elif settings.zero_stage == _PARTITIONED:
        against = "ZeRO-3 gathers weights for one product each, in 16 bits"
    elif not has_compiled:
        against = "without compiled blocks reading the scales costs more than the products save"
    else:
        against = why_no_torchao()  # last: the import takes seconds
    if against is not None:
        raise ConfigError(f"{where}: performance.fp8: cannot be {asked}: {against}. Set off.")
    return cast("Recipe", asked)
