"""The gradient of a loss at the weight of a decoder's last layer, without a backward pass through an engine.

An engine lets no one differentiate with respect to its parameters but itself: DeepSpeed's hooks take every
gradient that reaches one for a part of the update. What VQGAN's rule needs is had without: the output's
gradient is led back to what the last layer gave, along operations that hold no parameter, and the gradient at
its weight follows from that and from what went into it, whatever the weight is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from aiprod_ds.models.shapes import on_meta

_KINDS = (_ConvNd, nn.Linear)


@dataclass(slots=True, kw_only=True)
class Record:
    """What one forward pass left.

    Attributes:
        calls: Of the last layer, in order: arguments without a graph, and what it gave, with one.
        output: The reconstruction, before any hook of an engine.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)
    output: Tensor | None = None


class LastLayer:
    """The last layer of a decoder.

    Args:
        module: Wraps the VAE; before an engine takes it.
        name: Of a convolution or a linear layer in it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        layer = module.get_submodule(name)
        self.name = name
        self._blank, self._shape = _without_normalisation(layer)

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[Record]:
        """Yields what is filled by a forward pass of `module` in the block."""
        record = Record()

        def note_call(
            _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            record.calls.append((_detached(args), _detached(kwargs), output))

        def note_output(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            record.output = output[0]
            # Engines put hooks on what comes out. This is upstream of them.
            return (output[0].view_as(output[0]), *output[1:])

        # Registered after an engine's, so that they see what its own hooks have made of an output.
        handles = (
            module.get_submodule(self.name).register_forward_hook(note_call, with_kwargs=True),
            module.register_forward_hook(note_output),
        )
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def weight_gradient(self, record: Record, gradient: Tensor) -> Tensor:
        """Returns the gradient at the layer's weight, fp32, of a loss whose gradient at the reconstruction is
        `gradient`.

        Under weight normalisation it is that of the weight as it is used. The graph stays.

        Args:
            record: Of the forward pass.
            gradient: In the reconstruction's shape, fp32.
        """
        assert record.output is not None, "a forward pass has been recorded"
        # Gradients of a mean over many pixels would be 0 in fp16: a power of 2 keeps the greatest near 1.
        scale = torch.exp2(-torch.floor(torch.log2(gradient.abs().amax().clamp(min=1e-30))))
        at_calls = torch.autograd.grad(
            record.output,
            [output for _, _, output in record.calls],
            (gradient * scale).to(record.output.dtype),
            retain_graph=True,
        )
        total = torch.zeros(self._shape, device=gradient.device)
        for (args, kwargs, _), at_call in zip(record.calls, at_calls, strict=True):
            total += self._of_call(args, kwargs, at_call)
        return total / scale

    def _of_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Tensor) -> Tensor:
        """Returns the weight's gradient in one call: linear in what went in, so any weight will do."""
        zeros = {
            name: torch.zeros(value.shape, device=gradient.device)
            for name, value in self._blank.named_parameters()
        }
        weight = zeros["weight"].requires_grad_()
        with torch.enable_grad():
            output = functional_call(self._blank, zeros, _widened(args), _widened(kwargs))
        (found,) = torch.autograd.grad(output, weight, gradient.float())
        return found


def find_last_layer(module: nn.Module, clip: Tensor) -> str | None:
    """Returns the name of the convolution or linear layer that runs last in a forward pass; None if that
    cannot be found out without weights.

    Args:
        module: Wraps the VAE; its tensors may be on the meta device.
        clip: A batch of one, on the meta device.
    """
    return next(reversed(layers_run(module, clip) or {}), None)


def layers_run(module: nn.Module, clip: Tensor) -> dict[str, None] | None:
    """Returns the names of the convolutions and linear layers in the order in which they run last; None if
    the model does not run without weights."""
    blank, ran = on_meta(module), dict[str, None]()

    def note(name: str) -> Any:
        def hook(*_: object) -> None:
            ran.pop(name, None)
            ran[name] = None

        return hook

    for name, part in blank.named_modules():
        if isinstance(part, _KINDS):
            part.register_forward_hook(note(name))
    try:
        with torch.no_grad():
            blank(clip)
    except Exception:  # noqa: BLE001  a model may make tensors on the CPU inside of forward, or fail in another way
        return None
    return ran


def is_layer(module: nn.Module, name: str) -> bool:
    """Returns whether `name` is a convolution or linear layer in `module`."""
    return isinstance(dict(module.named_modules()).get(name), _KINDS)


def _without_normalisation(layer: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Returns a copy without values whose weight is a parameter, and the weight's shape."""
    blank: Any = on_meta(layer)
    for hooks in (blank._forward_hooks, blank._forward_pre_hooks):
        hooks.clear()
    if "weight" not in blank._parameters:  # computed from others: a property of a class made for that
        shape = blank.weight.shape
        blank.__class__ = type(blank).__bases__[0]
        for name in ("weight_g", "weight_v", "parametrizations"):
            blank._parameters.pop(name, None)
            blank._modules.pop(name, None)
        blank.weight = nn.Parameter(torch.empty(shape, device="meta"))
    return blank, tuple(blank.get_parameter("weight").shape)


def _detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    return values.detach() if isinstance(values, Tensor) else values


def _widened(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _widened(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_widened(value) for value in values)
    return values.float() if isinstance(values, Tensor) and values.is_floating_point() else values
