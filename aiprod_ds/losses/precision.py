"""The number format of every loss and metric: fp32, whatever the model computes in.

Owns the two things that takes: widening the inputs and switching autocast off around the arithmetic. fp64
stays fp64, so that gradients can be checked against finite differences. Called by every file of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Returns `tensor` in fp32 if it is fp16 or bf16 (its gradient returns in its own type), unchanged if
    fp32 or fp64."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Returns the context in which operations on `tensor`'s device keep the type of their inputs."""
    return torch.autocast("cpu" if tensor.device.type == "meta" else tensor.device.type, enabled=False)
