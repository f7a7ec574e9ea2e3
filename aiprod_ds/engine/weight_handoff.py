"""Parameter values on their way from one engine to the next, shared out so that no rank holds the whole
model.

Owns the parts and how they are put together again, not what the values are: whoever closes an engine adds
what its `Engine.read_value` returned, or something computed from it, and gives it to `Engine.write_values` of
the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError


class WeightHandoff:
    """fp32 tensors by name; of each, a rank keeps ceil(numel / ranks) values on the CPU.

    Example: of 5 values on 2 ranks, rank 0 keeps the first 3 and rank 1 the last 2 and a zero.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[torch.Size, Tensor]] = {}

    def __len__(self) -> int:
        """Returns the number of tensors."""
        return len(self._parts)

    def add(self, name: str, whole: Tensor) -> None:
        """Keeps this rank's part of a tensor.

        Args:
            name: Not added before.
            whole: The same on every rank, on any device; what is kept is a copy in fp32.

        Raises:
            EngineError: If the name was added before.
        """
        if name in self._parts:
            raise EngineError(f"{name}: must be carried once, got it again. Add each parameter once.")
        length = math.ceil(whole.numel() / dist.world_size())
        own = whole.detach().flatten()[dist.rank() * length :][:length]
        part = torch.zeros(length)
        part[: own.numel()].copy_(own)
        self._parts[name] = (whole.shape, part)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and whole fp32 tensors on this rank's device, one at a time in the order of `add`.
        Collective: all ranks iterate to the end."""
        device = dist.choose_device()
        for name, (shape, part) in self._parts.items():
            gathered = torch.empty(part.numel() * dist.world_size(), device=device)
            if dist.world_size() > 1:
                torch_dist.all_gather_into_tensor(gathered, part.to(device))
            else:
                gathered.copy_(part)
            yield name, gathered[: shape.numel()].view(shape)
