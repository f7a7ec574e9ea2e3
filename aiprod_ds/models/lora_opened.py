"""A LoRA on disk: its tensors, what its settings and metadata say, and the factor of every layer.

Opening and alpha; what the keys mean is `lora_keys.py`, the adapters `lora_files.py`, which calls this.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import read_text
from aiprod_ds.models.lora_keys import PREFIXES, other_kind
from aiprod_ds.tensor_file import TensorFile, TensorFileError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = "lora_adapter_metadata"
"""Of the metadata of files that diffusers or `save_peft` wrote: PEFT's settings."""

Alpha: TypeAlias = float | Literal["rank"] | None
"""What a LoRA was trained with, where its file does not say it: a number, or each layer's own rank."""

_METADATA_ALPHA = ("alpha", "lora_alpha", "ss_network_alpha", "network_alpha")
_OF_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change W itself
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedLora:
    """What is on disk; `settings` are PEFT's, empty where there are none."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: Mapping[str, Any]


def open_lora(path: Path) -> OpenedLora:
    """Returns what is in a PEFT folder or a file.

    Raises:
        CheckpointError: If it cannot be read, or its settings say that it is no LoRA.
    """
    if path.is_dir():
        settings = _json_object(path / CONFIG_FILE)
        tensors, metadata = read_tensors(path / WEIGHTS_FILE)
    else:
        tensors, metadata = read_tensors(path)
        settings = _settings_of_diffusers(path, metadata)
    kind = str(settings.get("peft_type") or "LORA")
    start = str(settings.get("init_lora_weights", "")).lower()
    other = [kind] if kind != "LORA" else [key for key in ("layer_replication",) if settings.get(key)]
    if start.startswith(_OF_OTHER_BASES):
        other.append(f"init_lora_weights {start}, whose base is not the model's own")
    if other:
        raise CheckpointError(f"{path}: must be a LoRA, got {', '.join(other)}. Merge it with its own tool.")
    return OpenedLora(path=path, tensors=tensors, metadata=metadata, settings=settings)


def require_lora(path: Path, keys: Collection[str]) -> None:
    """Checks that no key is of an adapter of another kind.

    Raises:
        CheckpointError: If one is, naming it.
    """
    for key in keys:
        if (kind := other_kind(key)) is not None:
            raise CheckpointError(
                f"{path}: must be a LoRA, got {kind} ({key}). Merge it with its own tool; `convert --rank` "
                "makes a LoRA of what comes out."
            )


def says_alpha(opened: OpenedLora) -> bool:
    """Whether settings or metadata say one alpha for all layers."""
    return "lora_alpha" in opened.settings or _told(opened) is not None or _is_folded(opened)


def layer_scales(
    opened: OpenedLora, parts: Mapping[str, Mapping[str, Tensor]], given: Alpha
) -> tuple[dict[str, float], set[str]]:
    """Returns the factor of every layer, and the layers whose alpha only this project would find.

    Args:
        opened: Says alpha, or not.
        parts: `down`, and `alpha` where there is one, by layer.
        given: For a file that does not say alpha.

    Raises:
        CheckpointError: If alpha is missing or told twice, or is no number.
    """
    own = {name: _own_alpha(opened, name, part) for name, part in parts.items()}
    ranks = {name: part["down"].shape[0] for name, part in parts.items()}
    common, is_folded = _common_alpha(opened, ranks)
    silent = [name for name in parts if own[name] is None and common is None and not is_folded]
    if given is not None and not silent:
        shown = given if given == "rank" else f"{given:g}"
        raise CheckpointError(
            f"{opened.path}: alpha must not be given for a file that says its own, got {shown}. Remove it."
        )
    if given is None and silent:
        several = len({ranks[name] for name in silent}) > 1
        usual = "of each layer" if several else f"({ranks[silent[0]]})"
        raise CheckpointError(
            f"{opened.path}: must say alpha, got none for {listed(silent)}. Give the one that it was trained "
            f"with as `alpha`; `alpha: rank` is the rank {usual}, which is what readers that know no alpha "
            "use."
        )
    is_stable = bool(opened.settings.get("use_rslora"))
    scales = {}
    for name, rank in ranks.items():
        if own[name] is None and is_folded:
            scales[name] = 1.0
            continue
        alpha = own[name] if own[name] is not None else common if common is not None else given
        number = float(rank) if alpha == "rank" else _finite(opened, "alpha", alpha)
        scales[name] = number / (math.sqrt(rank) if is_stable else rank)
    is_found = "lora_alpha" in opened.settings or is_folded or given == "rank"
    return scales, set() if is_found else {name for name in parts if own[name] is None}


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
        values = json.loads(metadata.get(SETTINGS, "{}"))
        known = {
            key: prefix
            for key in dict.keys(values)
            for prefix in reversed(PREFIXES)
            if key.startswith(prefix)
        }
        return {key.removeprefix(prefix): values[key] for key, prefix in known.items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {SETTINGS} must be a JSON object, got {error}.") from error


def _own_alpha(opened: OpenedLora, name: str, part: Mapping[str, Tensor]) -> float | None:
    """Returns the layer's own alpha: of its tensor, or of a pattern, which is PEFT's to match."""
    if "alpha" in part:
        if part["alpha"].numel() != 1:
            raise CheckpointError(
                f"{opened.path}: alpha of {name} must be one number, got {list(part['alpha'].shape)}."
            )
        return float(part["alpha"])
    patterns = opened.settings.get("alpha_pattern") or {}
    try:
        found = [value for key, value in patterns.items() if re.match(rf"(?:.*\.)?(?:{key})$", name)]
    except (AttributeError, re.error) as error:
        raise CheckpointError(
            f"{opened.path}: alpha_pattern must map patterns to numbers, got {error}."
        ) from error
    return _finite(opened, "alpha_pattern", found[0]) if found else None


def _common_alpha(opened: OpenedLora, ranks: Mapping[str, int]) -> tuple[float | None, bool]:
    """Returns the alpha of all layers, if the file says one, and whether it is multiplied into B already."""
    settings = opened.settings
    if "lora_alpha" in settings:
        if not settings.get("rank_pattern") and set(ranks.values()) - {settings.get("r")}:
            raise CheckpointError(
                f"{opened.path}: r must be the rank of all adapters {sorted(set(ranks.values()))}, got "
                f"{settings.get('r')!r}."
            )
        return _finite(opened, "lora_alpha", settings["lora_alpha"]), False
    if _is_folded(opened):
        return None, True
    told = _told(opened)
    return (None if told is None else _finite(opened, told, opened.metadata[told])), False


def _is_folded(opened: OpenedLora) -> bool:
    return opened.metadata.get("alpha_is_folded") == "true"


def _told(opened: OpenedLora) -> str | None:
    """Returns the key of the metadata that says alpha; None for none."""
    return next((key for key in _METADATA_ALPHA if opened.metadata.get(key) not in (None, "None")), None)


def _finite(opened: OpenedLora, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{opened.path}: {key} must be a finite number, got {value!r}.")
    return number
