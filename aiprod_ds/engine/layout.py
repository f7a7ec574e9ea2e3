"""What an engine trains; the same rules for every engine.

Owns the lookup of parameters in a module, alone and in groups, and what is asked of values for them. Called
by the engines; `whole_shape` also by the trainers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import Precision
from aiprod_ds.engine.protocol import ParameterGroup, group_names
from aiprod_ds.errors import CheckpointError, EngineError
from aiprod_ds.snapshot import EngineFacts

Value = TypeVar("Value", bound=Tensor)
TORCH_DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def whole_shape(parameter: Tensor) -> torch.Size:
    """Returns the shape of a parameter, also of one that ZeRO-3 has partitioned, which has one dimension
    until it is gathered."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def require_precision(facts: EngineFacts, precision: Precision) -> None:
    """Checks that a saved state was computed in this precision.

    Raises:
        CheckpointError: If it was another.
    """
    if facts.precision != precision:
        raise CheckpointError(
            f"engine state: must be of the same precision, got {facts.precision} there, {precision} here."
            " Resume with the settings of the saved run."
        )


def group_parameters(module: nn.Module, groups: Sequence[ParameterGroup]) -> list[list[nn.Parameter]]:
    """Returns the parameters of each group, in the order of its names.

    Raises:
        EngineError: If the groups do not name every trainable parameter of `module` exactly once, or name a
            frozen one.
    """
    by_name = dict(module.named_parameters())
    names = group_names(groups)
    trainable = {name for name, parameter in by_name.items() if parameter.requires_grad}
    unknown = sorted(set(names) - trainable)
    if unknown:
        raise EngineError(
            f"parameter groups: must name trainable parameters of the module, got {unknown[:5]}. Correct "
            "them."
        )
    if len(names) != len(trainable):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise EngineError(
            "parameter groups: must name every trainable parameter once, got"
            f" missing {sorted(trainable - set(names))[:5]}, repeated {twice[:5]}. Correct the groups or "
            "freeze the parameters."
        )
    if not names:
        raise EngineError(
            "parameter groups: must name at least one parameter, got none. The module has nothing to train."
        )
    return [[by_name[name] for name in group.names] for group in groups]


def find_parameter(parameters: Mapping[str, Value], name: str, *, where: str) -> Value:
    """Returns the parameter of that name.

    Args:
        parameters: The module's, by name.
        name: Of the one that is wanted.
        where: The call that wants it, for the message.

    Raises:
        EngineError: If there is none.
    """
    if name not in parameters:
        raise EngineError(
            f"{where}: must name a parameter of the module, got {name!r}. Use a name of `named_parameters()`."
        )
    return parameters[name]


def require_shape(value: Tensor, shape: torch.Size, *, name: str) -> None:
    """Checks what `Engine.write_values` is given for the parameter `name` of the whole `shape`.

    Raises:
        EngineError: If the shapes differ.
    """
    if value.shape != shape:
        raise EngineError(
            f"write_values: {name} must have the shape {list(shape)}, got {list(value.shape)}. Give all of "
            "it."
        )


def persistent_tensors(module: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns, for what `module.state_dict()` holds, the parameter's own name by key, and the buffers by key.

    A tied parameter has several keys and one name: the first that `named_parameters` yields.
    """
    own_names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters: dict[str, str] = {}
    buffers: dict[str, Tensor] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            parameters[key] = own_names[id(value)]
        elif isinstance(value, Tensor):
            buffers[key] = value
    return parameters, buffers
