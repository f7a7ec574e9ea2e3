"""What a model says about itself: its configuration, and its shapes on the meta device, where nothing takes
memory.

Called by the modules that find out strides.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn


def on_meta(module: nn.Module) -> nn.Module:
    """Returns a copy of `module` whose tensors have shapes and no values; the original is left as it is."""
    tensors = [*module.parameters(), *module.buffers()]
    # A weight that a hook computes (weight norm) is neither, and cannot be copied.
    tensors += [
        value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)
    ]
    placed: dict[int, object] = {id(tensor): _placed(tensor) for tensor in tensors}
    return copy.deepcopy(module, memo=placed)  # the memo stands in for every tensor, so no weight is copied


def _placed(tensor: Tensor) -> Tensor:
    shape = tensor.detach().to("meta")
    return (
        nn.Parameter(shape, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    )


def declared_number(module: nn.Module, *names: str) -> int | None:
    """Returns the first positive whole number that the module or its configuration holds under one of
    `names`."""
    config = getattr(module, "config", {})
    for name in names:
        value = vars(module).get(name)  # not getattr: diffusers warns when an attribute comes from its config
        if value is None and hasattr(config, "get"):
            value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None
