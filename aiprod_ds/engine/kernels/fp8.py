"""Products of linear layers in 8 bits: forward, and both of the backward pass.

Owns which layers take part, and the switch; the products and their scales are torchao's, which reads the
largest values of both factors anew at every product. Weights and gradients stay as they are.

torchao is imported where it is used: it takes seconds, and runs without 8 bits do not need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from aiprod_ds.errors import EngineError

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
CAPABILITY = (8, 9)  # the first GPUs with such products
_LEAST_WIDTH = 1024  # below, reading the scales costs more than the product saves
_MULTIPLE = 16  # of what the kernels take
_ADDED = "_added_for_fp8"


def set_fp8(blocks: Iterable[nn.Module], *, recipe: Recipe | None, least_width: int = _LEAST_WIDTH) -> int:
    """Switches the linear layers of `blocks` to products in 8 bits or back, in place; names and parameters
    stay.

    Takes part what is trained and wide. Of a frozen layer torchao would compute the weight's gradient, too,
    so the layers under adapters stay in 16 bits.

    Args:
        blocks: Before they are compiled and before an engine takes them.
        recipe: Of torchao: one scale for a tensor, one for each row and column, or the latter with the
            products of weights' gradients in 16 bits. None undoes what a recipe did, and is allowed at any
            time.
        least_width: Of a layer's input and output.

    Returns:
        How many layers take part.

    Raises:
        EngineError: If torchao is not installed.
    """
    layers = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    for layer in layers:
        _undo(layer)
    if recipe is None:
        return 0
    why_not = why_no_torchao()
    if why_not is not None:
        raise EngineError(f"performance.fp8: cannot be {recipe}, {why_not}. Install aiprod-ds[fp8].")
    chosen = [layer for layer in layers if _takes_part(layer, least_width)]
    for layer in chosen:
        _apply(layer, recipe)
    return len(chosen)


def why_no_torchao() -> str | None:
    """Returns why torchao cannot be used; None if it can."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"it needs torchao ({error})"
    return None


def _takes_part(layer: nn.Linear, least_width: int) -> bool:
    sizes = layer.in_features, layer.out_features
    return (
        type(layer) is nn.Linear
        and layer.weight.requires_grad
        and min(sizes) >= least_width
        and all(size % _MULTIPLE == 0 for size in sizes)
    )


def _apply(layer: nn.Linear, recipe: Recipe) -> None:
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    with torch.device("meta"):
        made = Float8Linear(
            layer.in_features,
            layer.out_features,
            bias=False,
            config=Float8LinearConfig.from_recipe_name(recipe),
        )
    # Its own `from_float` makes another module: hooks and everybody's references would keep the old one.
    added = {name: value for name, value in vars(made).items() if name not in vars(layer)}
    vars(layer).update(added, **{_ADDED: tuple(added)})
    layer.__class__ = Float8Linear


def _undo(layer: nn.Linear) -> None:
    added = vars(layer).pop(_ADDED, None)
    if added is None:
        return
    for name in added:
        del vars(layer)[name]
    layer.__class__ = nn.Linear
