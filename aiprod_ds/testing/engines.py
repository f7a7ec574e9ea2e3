"""What tests of engines build, train and compare: an engine and its end, a block of uneven size, states,
distances of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.train.engines import decay_groups


@contextmanager
def deepspeed_engine(
    module: nn.Module, *, optimizer: OptimizerConfig, settings: DeepSpeedSettings, micro_batch_size: int
) -> Iterator[Any]:
    """Yields a DeepSpeed engine that trains `module` without accumulation, and closes it after the block.
    Collective.

    After an error it stays open: closing is collective, and the launcher ends the ranks.
    """
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    engine = DeepSpeedEngine(
        module,
        decay_groups(module),
        optimizer=optimizer,
        settings=settings,
        micro_batch_size=micro_batch_size,
        accumulation=1,
    )
    yield engine
    engine.close()


class UnevenBlock(nn.Module):
    """A residual block that owns a parameter itself; its 33 hidden channels are odd, so two ranks share them
    unevenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 33)
        self.down = nn.Linear(33, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns hidden states [..., width] of the shape that they came in."""
        mixed: Tensor = self.down(nn.functional.gelu(self.up(hidden * self.scale)))
        return hidden + mixed


def optimized_state(engine: Engine) -> dict[str, dict[str, Any]]:
    """Returns fp32 value, step and moments of every trained parameter by its name, whole on rank 0.
    Collective."""
    return {
        state.name: {"value": state.value, "step": state.step, **state.optimizer}
        for state in engine.parameter_states()
    }


def is_same_state(first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether two results of `optimized_state` are equal to the bit."""
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(
            torch.equal(torch.as_tensor(first[name][key]), torch.as_tensor(second[name][key]))
            for key in first[name]
        )
        for name in first
    )


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Returns the L2 norm of the difference of two modules' tensors, over all of them."""
    assert first.keys() == second.keys()
    return float(torch.cat([(first[name].float() - second[name].float()).flatten() for name in first]).norm())
