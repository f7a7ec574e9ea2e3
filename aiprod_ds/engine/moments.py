"""Adam's state as every optimizer that the engines use keeps it, and what a phase may do to it.

Owns how they begin and their scaling, not where an engine keeps them. Called by the engines only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import MOMENTS


def scale_moments(states: Iterable[dict[str, Any]], factor: float) -> None:
    """Multiplies both moments of each state by `factor`, in place: whoever holds a view of them sees the
    change.

        exp_avg *= factor;  exp_avg_sq *= factor;  step *= 0 if factor == 0

    Worked example: factor 0.25 turns a state with exp_avg 4, exp_avg_sq 16 and step 7 into 1, 4 and 7; factor
    0 into 0, 0 and 0, so that bias correction starts anew. What the moments alone do next, exp_avg /
    sqrt(exp_avg_sq), shrinks to sqrt(factor).

    Args:
        states: `optimizer.state.values()`; before the first update there are none.
        factor: In [0, 1]; 1 changes nothing.

    Raises:
        EngineError: If `factor` is out of range.
    """
    if not 0.0 <= factor <= 1.0:
        raise EngineError(
            f"scale_moments: factor must lie in [0, 1], got {factor}. 0 resets the moments and 1 keeps them."
        )
    for state in states:
        for name in MOMENTS:
            if factor == 0.0:
                state[name].zero_()  # a product would keep what is not finite
            elif factor != 1.0:
                state[name].mul_(factor)
        if factor == 0.0:
            state["step"] *= 0  # an int (DeepSpeedCPUAdam) or a tensor (torch)


def new_moments(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> dict[str, Any]:
    """Returns a state of zeros after `step` updates, as the optimizer itself begins it at its first.

    torch counts in a 0-dim tensor, on the device if it is fused and on the CPU otherwise
    (torch/optim/adam.py, `_init_group`); DeepSpeedCPUAdam in an int (ops/adam/cpu_adam.py, `step`).
    """
    count: Tensor | int = step
    if isinstance(optimizer, torch.optim.AdamW):
        is_fused = bool(optimizer.param_groups[0]["fused"])
        count = torch.tensor(float(step), device=master.device if is_fused else "cpu")
    return {"step": count, **{name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}}
