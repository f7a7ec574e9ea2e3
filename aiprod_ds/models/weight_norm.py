"""Weight normalisation that computes the weight when it is used, and not in a hook before.

Owns the change from `torch.nn.utils.weight_norm`; called when a VAE is prepared for training.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


def compute_weights_in_forward(module: nn.Module) -> None:
    """Replaces the hooks of `torch.nn.utils.weight_norm` in all parts of `module`, in place, by a property
    that computes

        weight = weight_g * weight_v / ||weight_v||

    wherever the forward reads it. Parameters, keys of `state_dict` and values stay as they are; a second call
    changes nothing.

    The hook leaves the weight behind as an attribute: another copy of the model in memory, whole on every
    rank even where ZeRO-3 shards the parameters, which no cast reaches and which makes `copy.deepcopy` fail.
    The numbers are the same.
    """
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm):
                del part._forward_pre_hooks[key]
                vars(part).pop(hook.name, None)
                part.__class__ = _with_property(type(part), hook.name, hook.dim)  # type: ignore[arg-type]  # mypy: a class is hashable


@functools.cache
def _with_property(original: type[nn.Module], name: str, dim: int) -> type[nn.Module]:
    def weight(self: nn.Module) -> Tensor:
        return torch._weight_norm(getattr(self, f"{name}_v"), getattr(self, f"{name}_g"), dim)

    return type(original.__name__, (original,), {name: property(weight)})
