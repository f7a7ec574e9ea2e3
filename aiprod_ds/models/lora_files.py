"""LoRA files of any common form, read for one transformer, and their merging into a plain model.

Owns keys, alpha and checks; adapters inside a model that trains them are `lora.py`. Forms, all safetensors,
never pickle:

- a PEFT folder: `adapter_config.json` beside `adapter_model.safetensors`;
- one file whose keys are `<prefix><layer>.<part>`. The prefix is `diffusion_model.` (ComfyUI), `transformer.`
  (diffusers), `base_model.model.` (PEFT) or none. The layer has its name in diffusers or in the model's first
  publication, or either with `lora_unet_` before it and `_` for every dot. The part is `lora_A.weight` and
  `lora_B.weight`, or `lora_down.weight` and `lora_up.weight`, and `alpha`.

Shapes: A [rank,in], B [out,rank], W [out,in].
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import read_text
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.tensor_file import TensorFile, TensorFileError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = re.compile(r"^(?:base_model\.model|diffusion_model|transformer)\.")
_UNDERSCORED = "lora_unet_"
_KEY = re.compile(
    r"^(?P<layer>.+?)\.(?:(?P<down>lora_A(?:\.default)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(?:\.default)?\.weight|lora_up\.weight|lora\.up\.weight)|(?P<alpha>alpha))$"
)
_DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # in the metadata of files that diffusers or `save_peft` wrote
_OTHER_KINDS = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias")
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLora:
    """The adapter of one layer.

    Attributes:
        down: A [rank,in] fp32.
        up: B [out,rank] fp32.
        scale: Factor of B A.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """A LoRA for one transformer.

    Attributes:
        source: Where it was read, for messages.
        layers: By the layers' names in the plain transformer, in its order.
    """

    source: Path
    layers: Mapping[str, LayerLora]

    def ranks(self) -> tuple[int, ...]:
        """Returns the different ranks, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))

    def tensors(self) -> dict[str, Tensor]:
        """Returns A and B by the names `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"] = layer.down, layer.up
        return named

    def scales(self) -> dict[str, float]:
        """Returns the factor of B A by layer."""
        return {name: layer.scale for name, layer in self.layers.items()}


def read_lora(
    path: Path, transformer: nn.Module, family: Family, *, alpha: float | None = None
) -> LoraWeights:
    """Reads a LoRA of any form that the head of this file names. The scale of a layer is alpha / rank, with
    its own rank.

    Alpha is, in this order: the layer's `alpha` tensor; `lora_alpha` of PEFT's settings; in the metadata
    `alpha_is_folded` (the scale is then 1) or `alpha`; the argument.

    Worked number: alpha 6 and A with 4 rows make the scale 1.5.

    Args:
        path: A PEFT folder or a file.
        transformer: The plain model; may be on the meta device.
        family: The one that describes `transformer`; knows its layers' original names.
        alpha: For a file that does not say it, and for no other.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, has layers or shapes that the
            transformer has not, or alpha is missing or told twice.
    """
    opened = _open(path)
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    parts = _by_layer(opened, _names_in_files(linear, family), type(transformer).__name__)
    for name in parts:
        _require_fitting(path, name, parts[name], linear[name])
    scales = _scales(opened, parts, alpha)
    layers = {
        name: LayerLora(down=parts[name]["down"].float(), up=parts[name]["up"].float(), scale=scales[name])
        for name in linear
        if name in parts
    }
    return LoraWeights(source=path, layers=layers)


def merge_into(transformer: nn.Module, lora: LoraWeights) -> None:
    """Adds scale * B A to the weights W of a plain transformer, in place; the sum is made in fp32 and rounded
    to W's type.

    Weights must be whole: not partitioned by ZeRO-3.
    """
    for name, layer in lora.layers.items():
        weight = transformer.get_parameter(f"{name}.weight")
        with torch.no_grad():
            difference = layer.scale * (layer.up.to(weight.device) @ layer.down.to(weight.device))
            weight.copy_(weight.float() + difference)


def listed(names: Collection[str]) -> str:
    """Returns the first names and how many more there are, for messages."""
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of one safetensors file.

    Raises:
        CheckpointError: If it is missing or not safetensors.
    """
    try:
        with TensorFile(path) as file:
            return dict(file), dict(file.metadata)
    except TensorFileError as error:
        raise CheckpointError(
            f"{path}: must be a safetensors file, got {error}. Convert it or load it again."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """What is on disk; `settings` are PEFT's, empty where there are none."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: Mapping[str, Any]


def _open(path: Path) -> _Opened:
    if path.is_dir():
        settings = _json_object(path / CONFIG_FILE)
        tensors, metadata = read_tensors(path / WEIGHTS_FILE)
    else:
        tensors, metadata = read_tensors(path)
        settings = _settings_of_diffusers(path, metadata)
    kind = str(settings.get("peft_type") or "LORA")
    other = [key for key in _OTHER_KINDS if settings.get(key)] or ([kind] if kind != "LORA" else [])
    if other:
        raise CheckpointError(
            f"{path}: must be a plain LoRA, got {', '.join(other)}. Merge it with its own tool."
        )
    return _Opened(path=path, tensors=tensors, metadata=metadata, settings=settings)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: must be the JSON of a PEFT adapter, got {error}. Name its folder or a safetensors file."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}.")
    return values


def _settings_of_diffusers(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns PEFT's settings out of the metadata, whose keys have the component's prefix."""
    try:
        values = json.loads(metadata.get(_DIFFUSERS_SETTINGS, "{}"))
        return {_PREFIX.sub("", key): value for key, value in values.items() if _PREFIX.match(key)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: metadata {_DIFFUSERS_SETTINGS} must be a JSON object, got {error}."
        ) from error


def _names_in_files(linear: Collection[str], family: Family) -> dict[str, str]:
    """Returns the layers' names by every name that a file may have for them."""
    found = {}
    for written in (family.original_name, str):  # where both forms have a name, diffusers' layer is meant
        for name in linear:
            found[_UNDERSCORED + written(name).replace(".", "_")] = name
            found[written(name)] = name
    return found


def _by_layer(opened: _Opened, known: Mapping[str, str], model: str) -> dict[str, dict[str, Tensor]]:
    """Returns `down`, `up` and `alpha` of every layer of the transformer that the file adapts."""
    matched = {key: _KEY.match(key) for key in opened.tensors}
    other = [key for key, match in matched.items() if match is None]
    if other or not matched:
        raise CheckpointError(
            f"{opened.path}: must hold nothing but lora_A and lora_B (or lora_down and lora_up) and alpha "
            "of Linear layers, got "
            f"{listed(other) or 'no tensors'}. DoRA, LoHa, LoKr, biases and whole differences are not read: "
            "merge such a file "
            "with its own tool."
        )
    parts: dict[str, dict[str, Tensor]] = {}
    unknown, twice = [], []
    for key, match in matched.items():
        assert match is not None
        assert match.lastgroup is not None
        name = known.get(_PREFIX.sub("", match["layer"]))
        if name is None:
            unknown.append(match["layer"])
        elif match.lastgroup in parts.setdefault(name, {}):
            twice.append(key)
        else:
            parts[name][match.lastgroup] = opened.tensors[key]
    if unknown:
        names = listed(sorted(set(unknown)))
        raise CheckpointError(
            f"{opened.path}: must adapt Linear layers of {model}, got {names}. Take the LoRA of this model."
        )
    if twice:
        raise CheckpointError(
            f"{opened.path}: must name every tensor once, got a second one in {listed(twice)}. Keep one of "
            "them."
        )
    return parts


def _require_fitting(path: Path, name: str, parts: Mapping[str, Tensor], module: nn.Linear) -> None:
    if not {"down", "up"} <= parts.keys():
        raise CheckpointError(
            f"{path}: must hold A and B of {name}, got {' and '.join(sorted(parts))} alone. Load it again."
        )
    down, up = list(parts["down"].shape), list(parts["up"].shape)
    rank = down[0] if down else 0
    if rank < 1 or (down, up) != ([rank, module.in_features], [module.out_features, rank]):
        raise CheckpointError(
            f"{path}: A and B of {name} must be [rank, {module.in_features}] and [{module.out_features}, "
            f"rank], got {down} and "
            f"{up}. Take the LoRA of this model."
        )
    if not all(value.is_floating_point() and bool(value.isfinite().all()) for value in parts.values()):
        raise CheckpointError(
            f"{path}: must hold finite floating-point numbers, got others for {name}. Load it again."
        )


def _scales(
    opened: _Opened, parts: Mapping[str, Mapping[str, Tensor]], given: float | None
) -> dict[str, float]:
    own = {name: _own_alpha(opened, name, part) for name, part in parts.items()}
    ranks = {name: part["down"].shape[0] for name, part in parts.items()}
    common, is_folded = _common_alpha(opened, ranks)
    silent = [name for name in parts if own[name] is None and common is None and not is_folded]
    if given is not None and not silent:
        raise CheckpointError(
            f"{opened.path}: alpha must not be given for a file that says its own, got {given:g}. Remove it."
        )
    if given is None and silent:
        usual = f"{ranks[silent[0]]}, the rank of {silent[0]}, makes the factor 1"
        raise CheckpointError(
            f"{opened.path}: must say alpha, got none for {listed(silent)}. Give the one that it was "
            "trained with as `alpha` "
            f"({usual}, which is what readers that know no alpha use)."
        )
    scales = {}
    for name, rank in ranks.items():
        alpha = own[name] if own[name] is not None else common if common is not None else given
        scales[name] = 1.0 if own[name] is None and is_folded else _finite(opened, "alpha", alpha) / rank
    return scales


def _own_alpha(opened: _Opened, name: str, part: Mapping[str, Tensor]) -> float | None:
    if "alpha" not in part:
        return None
    if part["alpha"].numel() != 1:
        raise CheckpointError(
            f"{opened.path}: alpha of {name} must be one number, got {list(part['alpha'].shape)}."
        )
    return float(part["alpha"])


def _common_alpha(opened: _Opened, ranks: Mapping[str, int]) -> tuple[float | None, bool]:
    """Returns the alpha of all layers, if the file says one, and whether it is multiplied into B already."""
    settings = opened.settings
    if "lora_alpha" in settings:
        if not settings.get("rank_pattern") and set(ranks.values()) != {settings.get("r")}:
            raise CheckpointError(
                f"{opened.path}: r must be the rank of all adapters {sorted(set(ranks.values()))}, got "
                f"{settings.get('r')!r}."
            )
        return _finite(opened, "lora_alpha", settings["lora_alpha"]), False
    if opened.metadata.get("alpha_is_folded") == "true":
        return None, True
    return (_finite(opened, "alpha", opened.metadata["alpha"]) if "alpha" in opened.metadata else None), False


def _finite(opened: _Opened, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{opened.path}: {key} must be a finite number, got {value!r}.")
    return number
