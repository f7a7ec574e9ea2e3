"""Tensors made of others one at a time: renamed, cast, merged with adapters, counted or held back as they
pass.

Pure: names and tensors; nothing is opened here. What conversions write is a chain of these over a
file, a folder or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aiprod_ds.convert.weights import merge, require_layers
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.lora_files import LoraWeights
from aiprod_ds.tensor_file import TensorSource, TensorSpec


class Renamed(TensorSource):
    """Some tensors of another source under other names, in the order of `names`.

    Args:
        source: May hold more tensors than are named.
        names: Name there by name here.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names
        self.specs = {name: source.specs[there] for name, there in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]


class Cast(TensorSource):
    """The same with all floating tensors in one type, rounded to nearest.

    Args:
        dtype: None changes nothing.

    Raises:
        CheckpointError: When a tensor is read that has numbers beyond the range of fp16.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self.specs = {
            name: TensorSpec(dtype=dtype, shape=spec.shape)
            if dtype and spec.dtype.is_floating_point
            else spec
            for name, spec in source.specs.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        value, dtype = self._source[name], self.specs[name].dtype
        cast = value.to(dtype)
        if (
            dtype == torch.float16
            and value.dtype != dtype
            and not torch.equal(cast.isfinite(), value.isfinite())
        ):
            raise CheckpointError(
                f"{name}: must be within +-65504 to become fp16, got {float(value.abs().max()):g}. Use bf16."
            )
        return cast


class Merged(TensorSource):
    """A plain model with adapters added to its weights: the sum is made in fp32 and rounded once.

    Args:
        adapters: A and B, by `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        scales: Factor of B A, by layer.
        dtype: Of all floating tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: If a layer is not in `base`; when a tensor is read, if a shape does not fit.
    """

    def __init__(
        self,
        base: TensorSource,
        adapters: Mapping[str, Tensor],
        scales: Mapping[str, float],
        dtype: torch.dtype | None,
    ) -> None:
        require_layers(base, scales)
        self._base, self._adapters, self._scales = base, adapters, scales
        self.specs = Cast(base, dtype).specs

    def __getitem__(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        scales = {layer: self._scales[layer]} if layer != name and layer in self._scales else {}
        ((_, value),) = merge({name: self._base[name]}, self._adapters, scales)
        return value.to(self.specs[name].dtype)


class WithLora(TensorSource):
    """A plain model with a LoRA of a file in its parameters; sums are made in fp32 and rounded once.

    Args:
        base: The plain model, by diffusers' names.
        lora: Of that model.
        dtype: Of all floating tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: If a parameter is not in `base`.
    """

    def __init__(self, base: TensorSource, lora: LoraWeights, dtype: torch.dtype | None = None) -> None:
        missing = sorted(lora.parameters() - base.specs.keys())
        if missing:
            raise CheckpointError(
                f"{lora.source}: must belong to parameters of the base model, got {', '.join(missing[:3])}. "
                "Take its own base."
            )
        self._base, self._lora, self._changed = base, lora, lora.parameters()
        self.specs = Cast(base, dtype).specs

    def __getitem__(self, name: str) -> Tensor:
        value = self._base[name]
        if name in self._changed:
            value = self._lora.applied(name, value)
        return value.to(self.specs[name].dtype)


class Joined(TensorSource):
    """The tensors of several sources, whose names differ, one source after another."""

    def __init__(self, *sources: TensorSource) -> None:
        self._source_of = {name: source for source in sources for name in source}
        self.specs = {name: source.specs[name] for name, source in self._source_of.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._source_of[name][name]


class Confirmed(TensorSource):
    """The same, with a condition: the last of the tensors is given only once `confirm` has returned.

    So a result that is made of all of them cannot become whole without it.

    Args:
        confirm: Raises if nothing may be made of the tensors; may be called more than once.
    """

    def __init__(self, source: TensorSource, confirm: Callable[[], object]) -> None:
        self._source, self._confirm, self._unread = source, confirm, set(source.specs)
        self.specs = source.specs

    def __getitem__(self, name: str) -> Tensor:
        value = self._source[name]
        self._unread.discard(name)
        if not self._unread:
            self._confirm()
        return value


class Counted(TensorSource):
    """The same, telling how many bytes were asked for: what a progress bar shows.

    Args:
        passed: Called with the bytes of each tensor after it was read.
    """

    def __init__(self, source: TensorSource, passed: Callable[[int], object]) -> None:
        self._source, self._passed = source, passed
        self.specs = source.specs

    def __getitem__(self, name: str) -> Tensor:
        value = self._source[name]
        self._passed(value.nbytes)
        return value
