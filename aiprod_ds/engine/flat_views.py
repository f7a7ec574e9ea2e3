"""The weights of a block as views of its flat parameters, for the time in which it runs.

A block's hooks put the views in place before its forward and take them away after it. Owns them, and what
else must know of views: recomputation, which runs parts of a block later, and autograd, which would keep what
ZeRO-3 has gathered from the forward pass to the backward pass. Which parameters are flat is
`flat_parameters`.

Where hooks are traced by torch.compile, so are the views: what is compiled takes the flat parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from aiprod_ds.engine.flat_layout import FlatLayout
from aiprod_ds.errors import EngineError

Result = TypeVar("Result")
_VIEWS = "_flat_views"
_PLACED: list[nn.Module] = []  # the innermost last


class InFlatParameter:
    """Stands where a weight was while its block does not run: whoever computes with it gets an error that
    says so, and whoever prints the module does not."""


IN_FLAT_PARAMETER = InFlatParameter()


@dataclass(slots=True, kw_only=True)
class FlatView:
    """Where a member of a flat parameter goes.

    Attributes:
        owner: The module whose weight it is.
        attribute: Its name there.
        shape: Of the weight.
        piece: Its index among the pieces of the flat parameter.
    """

    owner: nn.Module
    attribute: str
    shape: tuple[int, ...]
    piece: int


@dataclass(slots=True, kw_only=True)
class FlatSplit:
    """One flat parameter of a block.

    Attributes:
        attribute: Its name in the block.
        sizes: Of the pieces that it is split into.
        views: What becomes of them; pieces that are padding are in none.
    """

    attribute: str
    sizes: list[int]
    views: list[FlatView]

    @classmethod
    def of(cls, attribute: str, layout: FlatLayout, owners: Sequence[tuple[nn.Module, str]]) -> FlatSplit:
        """Returns how a flat parameter is split; `owners` has module and attribute of each member."""
        sizes, pieces = layout.pieces()
        views = [
            FlatView(owner=owner, attribute=name, shape=member.shape, piece=piece)
            for (owner, name), member, piece in zip(owners, layout.members, pieces, strict=True)
        ]
        return cls(attribute=attribute, sizes=sizes, views=views)


class BlockHooks:
    """Makes a block run with views as its weights until `remove`.

    Args:
        block: Has the flat parameters.
        splits: All of them.
        is_traced: Whether torch.compile may trace the hooks where it compiles more than the block's forward.
    """

    def __init__(self, block: nn.Module, splits: Sequence[FlatSplit], *, is_traced: bool) -> None:
        self._block = block
        block.__dict__[_VIEWS] = list(splits)
        before, after = (_place, _remove) if is_traced else (_untraced_place, _untraced_remove)
        # After an error too: torch's checkpointing ends a recomputation by one.
        self._handles = [
            block.register_forward_pre_hook(before),
            block.register_forward_hook(after, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks away, so that the block has no weights until it is given some."""
        for handle in self._handles:
            handle.remove()
        del self._block.__dict__[_VIEWS]


def placed_blocks() -> tuple[nn.Module, ...]:
    """Returns the blocks that run now and have views in place, the innermost last."""
    return tuple(_PLACED)


def call_with_views(
    blocks: Sequence[nn.Module], function: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Returns what `function` returns while all of `blocks` have their views in place.

    Args:
        blocks: From `placed_blocks`; some of them may run now, too.
        function: A part of the innermost one, or all of it, without its hooks.
        *args: Of the function.
        **kwargs: Of the function.
    """
    missing = [block for block in blocks if block not in _PLACED]
    for block in missing:
        _place(block)
    try:
        return function(*args, **kwargs)
    finally:
        for block in reversed(missing):
            _remove(block)


def saving_by_place() -> saved_tensors_hooks:
    """Returns a context in which autograd saves views by their place in a flat parameter, not by memory.

    For parameters that are gathered while a block runs and again before its backward pass: without it, what
    the forward pass gathered would stay until then. What recomputation saves is left to torch.
    """
    return saved_tensors_hooks(_pack, _unpack)


def _place(block: nn.Module, *_: Any) -> None:
    splits: list[FlatSplit] = block.__dict__[_VIEWS]
    is_traced = torch.compiler.is_compiling()
    for split in splits:
        pieces = torch.split(getattr(block, split.attribute), split.sizes)
        for view in split.views:
            piece = pieces[view.piece]
            weight = piece if len(view.shape) == 1 else piece.view(view.shape)
            if is_traced:
                setattr(view.owner, view.attribute, weight)
            else:  # without what nn.Module.__setattr__ looks up first, a weight at a time
                view.owner.__dict__[view.attribute] = weight
    if not is_traced:
        _PLACED.append(block)


def _remove(block: nn.Module, *_: Any) -> None:
    splits: list[FlatSplit] = block.__dict__[_VIEWS]
    is_traced = torch.compiler.is_compiling()
    if not is_traced and block in _PLACED:  # not after an error that came before the views
        _PLACED.remove(block)
    for split in splits:
        for view in split.views:
            if is_traced:
                setattr(view.owner, view.attribute, IN_FLAT_PARAMETER)
            else:
                view.owner.__dict__[view.attribute] = IN_FLAT_PARAMETER


_untraced_place: Callable[..., None] = torch.compiler.disable(_place)  # type: ignore[no-untyped-call]
_untraced_remove: Callable[..., None] = torch.compiler.disable(_remove)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Place:
    """A view of any strides into a flat parameter."""

    flat: Tensor
    numel: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _pack(tensor: Tensor) -> Tensor | _Place:
    if not _PLACED:
        return tensor
    address = tensor.untyped_storage().data_ptr()
    for block in reversed(_PLACED):
        for split in block.__dict__[_VIEWS]:
            flat: Tensor = getattr(block, split.attribute)
            if flat.untyped_storage().data_ptr() == address and flat.dtype == tensor.dtype:
                place = _place_in(flat, tensor)
                if place is not None:
                    return place
    return tensor


def _place_in(flat: Tensor, tensor: Tensor) -> _Place | None:
    """Returns where `tensor` lies in the flat parameter; None if in another that shares its memory."""
    offset = tensor.storage_offset() - flat.storage_offset()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or offset < 0 or offset + extent >= flat.numel():
        return None
    return _Place(flat, flat.numel(), int(offset), tensor.shape, tensor.stride())


def _unpack(saved: Tensor | _Place) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    flat = saved.flat.detach()
    if flat.numel() != saved.numel:
        raise EngineError(
            "flat parameters: must be gathered before gradients are computed with them, got one that is not."
            " Set engine.flat_parameters to off."
        )
    return flat.as_strided(saved.size, saved.stride, flat.storage_offset() + saved.offset)
