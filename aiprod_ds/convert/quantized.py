"""Weights that lie in few bits beside the numbers that give them their meaning, as what they stand for.

Read: fp8 and int8 with one scale, or one for each row (ComfyUI's `scale_weight`, `weight_scale` and
`comfy_quant`), and int8, nf4 and fp4 of bitsandbytes. Whatever else is known to be such a number is
refused by name, because the weight beside it means nothing without it. A weight in fp8 alone is a number
and stays one.

    fp8, int8          W = q * scale
    int8 (bnb)         W = q * SCB / 127
    nf4, fp4 (bnb)     W = quant_map[code] * absmax of its block; absmax may be in 8 bits in the same way

Sources: ComfyUI comfy/utils.py (`convert_old_quants`) and comfy/ops.py; bitsandbytes functional.py
(`QuantState`, `dequantize_blockwise`). Called by `sources`; knows no model.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.convert.derived import Renamed
from aiprod_ds.errors import CheckpointError
from aiprod_ds.tensor_file import TensorSource, TensorSpec

METADATA_KEY = "_quantization_metadata"
"""Of a file's metadata, where ComfyUI names the format of every layer."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale")
_OF_INPUTS = (".scale_input", ".input_scale")  # of activations, in kernels that multiply in fp8
_MARKER, _FORMAT = "scaled_fp8", ".comfy_quant"
_FORMATS = {"float8_e4m3fn": _FP8[:1], "float8_e5m2": _FP8[1:], "int8_tensorwise": (torch.int8,)}
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "convrot_groupsize"}
_BNB_STATE = re.compile(r"^(?P<layer>.+)\.weight\.quant_state\.bitsandbytes__(?:nf4|fp4)$")
_BNB_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_REFUSED = {
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 in blocks",
    ".weight_s_rel": "4-bit weights of ComfyUI",
    ".weight_s_channel": "4-bit weights of ComfyUI",
    ".weight_codebook": "4-bit weights of ComfyUI",
    ".weight._data": "quanto",
    ".weight._scale": "quanto",
    ".weight_qdata": "torchao",
    ".weight_packed": "compressed-tensors",
    ".weight_quantizer._amax": "ModelOpt",
    ".weight_quantizer._scale": "ModelOpt",
    ".weight_quantizer._double_scale": "ModelOpt",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".qzeros": "GPTQ or AWQ",
    ".wscales": "SVDQuant",
}


def formats_of_layers(text: str, names: Collection[str]) -> str:
    """Returns ComfyUI's metadata with the formats of those layers alone whose weights are in `names`."""
    try:
        told: Any = json.loads(text)
        kept = {layer: each for layer, each in told["layers"].items() if f"{layer}.weight" in names}
        return json.dumps({**told, "layers": kept})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{METADATA_KEY}: must be JSON that names the format of layers, got {error!r}. Remove "
            "--parts-from."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """How one weight lies in the file: what it becomes, by a name that people know, and who reads it."""

    spec: TensorSpec
    kind: str
    read: Callable[[], Tensor]


class Dequantized(TensorSource):
    """The same with every quantised weight as the fp32 numbers that it stands for, without its scales.

    Args:
        source: May hold no quantised weight; then nothing changes.
        metadata: Of the file, where formats may be named.
        is_other: Whether a name is of another model in the file; such tensors stay as they are.

    Attributes:
        told: What was done, for people; None for nothing.

    Raises:
        CheckpointError: If a weight is in a form that is not read here, or its scale does not fit it.
    """

    def __init__(
        self,
        source: TensorSource,
        metadata: Mapping[str, str] | None = None,
        is_other: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._source = source
        own = Renamed(source, {name: name for name in source if not is_other(name)})
        told = _formats(own, metadata or {})
        formats = {layer: each for layer, each in told.items() if not is_other(f"{layer}.weight")}
        self._stored = {
            f"{layer}.weight": stored
            for layer in sorted(_layers(own))
            if (stored := _stored(own, layer, formats.get(layer))) is not None
        }
        _require_known(own, formats, self._stored)
        side = {name for name in own if _is_side(name, self._stored)}
        self.specs = {
            name: self._stored[name].spec if name in self._stored else spec
            for name, spec in source.specs.items()
            if name not in side
        }
        kinds = Counter(stored.kind for stored in self._stored.values())
        counted = ", ".join(f"{count} weights of {kind}" for kind, count in sorted(kinds.items()))
        self.told = f"dequantised to fp32: {counted}" if kinds else None

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read() if name in self._stored else self._source[name]


def _layers(source: TensorSource) -> set[str]:
    return {name.removesuffix(".weight") for name in source if name.endswith(".weight")}


def _formats(source: TensorSource, metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Returns what the file says of each layer's format, by the layer's name in it."""
    try:
        told: Any = json.loads(metadata.get(METADATA_KEY, "{}")).get("layers", {})
        formats = {
            layer: {"format": each} if isinstance(each, str) else dict(each) for layer, each in told.items()
        }
        for name in source:
            if name.endswith(_FORMAT):
                formats[name.removesuffix(_FORMAT)] = dict(json.loads(bytes(source[name].flatten().tolist())))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{METADATA_KEY}: must be JSON that names the format of layers, got {error!r}. Take the file of "
            "another precision."
        ) from error
    layers = _layers(source)
    return {_in_file(layer, layers): each for layer, each in formats.items()}


def _in_file(layer: str, layers: set[str]) -> str:
    """Returns the layer's whole name: metadata may leave out what stands before the model's own names."""
    if layer in layers:
        return layer
    return next((name for name in layers if name.endswith(f".{layer}")), layer)


def _stored(source: TensorSource, layer: str, told: Mapping[str, Any] | None) -> _Stored | None:
    weight = f"{layer}.weight"
    scale = next((layer + ending for ending in _SCALES if layer + ending in source), None)
    if scale is not None:
        return _scaled(source, weight, scale, told)
    if told is not None:
        raise CheckpointError(
            f"{weight}: must have a scale beside it, got none for the format "
            f"{str(told.get('format'))[:40]!r}. "
            "Load the file again."
        )
    if f"{layer}.SCB" in source:
        return _bnb_int8(source, weight, f"{layer}.SCB")
    state = next(
        (name for kind in ("nf4", "fp4") if (name := f"{weight}.quant_state.bitsandbytes__{kind}") in source),
        None,
    )
    return None if state is None else _bnb_4bit(source, weight, state)


def _scaled(source: TensorSource, weight: str, scale: str, told: Mapping[str, Any] | None) -> _Stored:
    spec, of_scale = source.specs[weight], source.specs[scale]
    name = "float8_e4m3fn" if spec.dtype in _FP8 and told is None else str((told or {}).get("format"))
    other = sorted(key for key, value in (told or {}).items() if value and key not in _HARMLESS)
    known = _FP8 if told is None else _FORMATS.get(name, ())
    if spec.dtype not in known or other:
        found = str(spec.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{weight}: must be fp8, or int8 that says so, with one scale or one for each row, got {found} "
            "in "
            f"the format {name}{''.join(f', {key}' for key in other)}. Take the file of another precision."
        )
    rows = (spec.shape[0], *(1 for _ in spec.shape[1:])) if spec.shape else ()
    if not of_scale.dtype.is_floating_point or not (
        of_scale.numel == 1 or of_scale.shape in (rows, rows[:1])
    ):
        raise CheckpointError(
            f"{scale}: must be one number or one for each of the {spec.shape[0] if spec.shape else 0} rows "
            "of "
            f"the weight, got {list(of_scale.shape)}. Take the file of another precision."
        )

    def read() -> Tensor:
        factor = source[scale].float()
        return source[weight].float() * (factor.reshape(()) if factor.numel() == 1 else factor.reshape(rows))

    kind = "scaled int8" if spec.dtype == torch.int8 else "scaled fp8"
    return _Stored(spec=TensorSpec(dtype=torch.float32, shape=spec.shape), kind=kind, read=read)


def _bnb_int8(source: TensorSource, weight: str, scale: str) -> _Stored:
    spec, layout = source.specs[weight], f"{weight}_format"
    if spec.dtype != torch.int8 or len(spec.shape) != 2 or source.specs[scale].shape != spec.shape[:1]:
        raise CheckpointError(
            f"{weight}: must be an int8 matrix with SCB for each row, got {list(spec.shape)} and "
            f"{list(source.specs[scale].shape)}. Load the file again."
        )
    if layout in source and bool(source[layout].any()):  # 0 is by rows; others are tiled for old GPUs
        raise CheckpointError(f"{layout}: must be 0 (rows), got others. Save the model again.")

    def read() -> Tensor:
        return (source[weight].double() * source[scale].double()[:, None] / 127).float()

    spec = TensorSpec(dtype=torch.float32, shape=spec.shape)
    return _Stored(spec=spec, kind="bitsandbytes int8", read=read)


def _bnb_4bit(source: TensorSource, weight: str, state: str) -> _Stored:
    try:
        told = json.loads(bytes(source[state].flatten().tolist()))
        shape = tuple(int(size) for size in told["shape"])
        block, kind = int(told["blocksize"]), str(told["quant_type"])
        nested = (
            (int(told["nested_blocksize"]), float(told["nested_offset"])) if "nested_offset" in told else None
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{state}: must be bitsandbytes' JSON, got {error!r}. Load it again."
        ) from error
    num_blocks = -(-math.prod(shape) // max(block, 1))
    sizes = {f"{weight}.absmax": num_blocks, f"{weight}.quant_map": 16, weight: -(-math.prod(shape) // 2)}
    if nested is not None:
        sizes |= {f"{weight}.nested_absmax": -(-num_blocks // nested[0]), f"{weight}.nested_quant_map": 256}
    wrong = [name for name, size in sizes.items() if name not in source or source.specs[name].numel != size]
    if wrong or source.specs[weight].dtype != torch.uint8:
        raise CheckpointError(
            f"{weight}: must have all parts of {kind}, got others for {wrong}. Load it again."
        )

    def read() -> Tensor:
        absmax = source[f"{weight}.absmax"]
        if nested is not None:
            codes, largest = source[f"{weight}.nested_quant_map"], source[f"{weight}.nested_absmax"]
            absmax = _blocks(codes.float()[absmax.long()], largest.float(), nested[0]) + nested[1]
        packed = source[weight].flatten().long()
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: math.prod(shape)]
        values = source[f"{weight}.quant_map"].float()[codes]
        return _blocks(values, absmax.float(), block).reshape(shape)

    spec = TensorSpec(dtype=torch.float32, shape=shape)
    return _Stored(spec=spec, kind=f"bitsandbytes {kind}", read=read)


def _blocks(values: Tensor, largest: Tensor, block: int) -> Tensor:
    return values * largest.repeat_interleave(block)[: values.numel()]


def _is_side(name: str, stored: Mapping[str, _Stored]) -> bool:
    """Whether a tensor has no meaning beside the fp32 weights."""
    if name == _MARKER or name.endswith(f".{_MARKER}"):
        return True
    for ending in (*_SCALES, *_OF_INPUTS, _FORMAT, ".SCB", ".weight_format"):
        if name.endswith(ending) and f"{name.removesuffix(ending)}.weight" in stored:
            return True
    if (match := _BNB_STATE.match(name)) is not None:
        return f"{match['layer']}.weight" in stored
    return any(name.endswith(ending) and name.removesuffix(ending) in stored for ending in _BNB_PARTS)


def _require_known(
    source: TensorSource, formats: Mapping[str, Mapping[str, Any]], stored: Mapping[str, _Stored]
) -> None:
    """Refuses what gives a weight its meaning and was not read."""
    for name in source:
        for ending, kind in _REFUSED.items():
            if name.endswith(ending):
                raise CheckpointError(
                    f"{name}: must not be needed to know a weight, got a part of {kind}. Take the file of "
                    "another precision, such as bf16."
                )
        for ending in (*_SCALES, ".SCB"):
            if name.endswith(ending) and f"{name.removesuffix(ending)}.weight" not in stored:
                raise CheckpointError(f"{name}: must have a weight beside it, got none. Load the file again.")
    lost = [layer for layer in formats if f"{layer}.weight" not in stored]
    if lost:
        raise CheckpointError(
            f"{lost[0]}: must be a weight of the file, as it says its format, got none. Load the file again."
        )
