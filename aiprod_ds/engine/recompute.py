"""Activation checkpointing: which parts of a model are recomputed in the backward pass.

Owns the switch and nothing about engines; it is applied to the module before an engine takes it. It is always
torch's non-reentrant kind: the reentrant one loses the gradient behind frozen inputs (LoRA), and DeepSpeed's
own fails under ZeRO-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aiprod_ds.engine.flat_views import call_with_views, placed_blocks
from aiprod_ds.errors import EngineError

_ORIGINAL_CLASS = "_class_without_checkpointing"


def set_recompute(
    module: nn.Module, *, enabled: bool, blocks: Sequence[nn.Module] | None = None, every: int = 1
) -> None:
    """Switches recomputation on or off, in place; parameters, buffers and the keys of `state_dict` stay as
    they are.

    Args:
        module: The whole model. Models of diffusers inside it are switched by their own
            `enable_gradient_checkpointing`.
        enabled: Off undoes what on did, and is allowed at any time.
        blocks: The parts to recompute, each on its own, in place of that search. Without them and without a
            model of diffusers, every member of the outermost `nn.ModuleList`s of at least two modules of one
            class is a block. Members that only hold other modules and have no forward of their own are
            searched inside.
        every: More than 1: only every n-th of these blocks, the first among them, each on its own also in a
            model of diffusers, whose own switch knows all or none. The backward pass begins with the last
            blocks, so what they keep is soon gone in any case.

    Raises:
        EngineError: If `enabled` and there is nothing to recompute.
    """
    models = list(_diffusers_models(module))
    for model in models:
        model.disable_gradient_checkpointing()  # type: ignore[operator]  # a method, by _diffusers_models
    for part in module.modules():
        part.__class__ = _original_class(part)
    if not enabled:
        return
    if models and blocks is None and every == 1:
        for model in models:
            model.enable_gradient_checkpointing(_recompute)  # type: ignore[operator]  # as above
        return
    chosen = (list(blocks) if blocks is not None else list(repeated_blocks(module)))[::every]
    if not chosen:
        raise EngineError(
            f"activation_checkpointing: needs repeated blocks in the model, got {type(module).__name__} "
            "without any."
            " Set activation_checkpointing.enabled to false."
        )
    for block in chosen:
        # A subclass, not a wrapper module or an instance attribute: keys stay, and a deep copy calls itself
        # and not the original.
        block.__class__ = _checkpointed(_original_class(block))  # type: ignore[arg-type]  # mypy: a class is hashable


def _original_class(module: nn.Module) -> type[nn.Module]:
    original: type[nn.Module] = getattr(type(module), _ORIGINAL_CLASS, None) or type(module)
    return original


def _recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    blocks = () if torch.compiler.is_compiling() else placed_blocks()  # a compiled block keeps its weights
    if blocks:
        # A part of a block is recomputed without the block's hooks, after the forward of the block.
        function = functools.partial(call_with_views, blocks, function)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _diffusers_models(module: nn.Module) -> Iterable[nn.Module]:
    """Yields the outermost models that bring their own switch."""
    if getattr(module, "_supports_gradient_checkpointing", False) and hasattr(
        module, "enable_gradient_checkpointing"
    ):
        yield module
        return
    for child in module.children():
        yield from _diffusers_models(child)


def repeated_blocks(module: nn.Module) -> Iterable[nn.Module]:
    """Yields every member of the outermost `nn.ModuleList`s of at least two modules of one class."""
    if isinstance(module, nn.ModuleList) and _is_row_of_blocks(module):
        yield from module
        return
    for child in module.children():
        yield from repeated_blocks(child)


def _is_row_of_blocks(members: nn.ModuleList) -> bool:
    return (
        len(members) > 1
        and len({_original_class(member) for member in members}) == 1  # of some every n-th is recomputed
        and isinstance(members[0], nn.Module)  # diffusers' Cosmos has lists of None
        and type(members[0]).forward is not nn.Module.forward
    )


@functools.cache
def _checkpointed(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original.forward(self, *args, **kwargs)
        return _recompute(functools.partial(original.forward, self), *args, **kwargs)

    return type(original.__name__, (original,), {"forward": forward, _ORIGINAL_CLASS: original})
