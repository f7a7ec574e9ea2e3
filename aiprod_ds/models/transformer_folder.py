"""A transformer as the `config.json` of its folder describes it: shapes without weights, and its family.

Called by the conversions, which read weights tensor by tensor and never hold the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from aiprod_ds.config.run import ModelConfig
from aiprod_ds.curriculum.plan import ModelStrides
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.registry import build_model

_CONFIG = "config.json"


def describe_folder(folder: Path) -> tuple[nn.Module, Family]:
    """Returns the transformer on the meta device, and its family.

    Raises:
        CheckpointError: If there is no `config.json` of a known transformer.
        ConfigError: If the class refuses the configuration or the family the variant.
    """
    found = _class_name(folder / _CONFIG)
    known = [family.transformer_class for family in FAMILIES]
    if found not in known:
        raise CheckpointError(
            f"{folder / _CONFIG}: _class_name must be a known transformer ({', '.join(known)}), got {found!r}. "
            "Name the folder of the transformer, not of its pipeline."
        )
    transformer = build_model(ModelConfig(source=found, pretrained=str(folder)), seed=0, device="meta")
    return transformer, find_family(transformer, _strides(transformer))


def _class_name(path: Path) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be the JSON of a transformer of diffusers, got {error}. Name its folder.") from error
    return values.get("_class_name") if isinstance(values, dict) else None


def _strides(transformer: nn.Module) -> ModelStrides:
    """Returns what the transformer believes about its VAE, for the family to compare; nothing here depends on it."""
    config: Any = transformer.config
    temporal, spatial, *_ = config.get("vae_scale_factors", (1, 1))
    return ModelStrides(spatial=spatial, temporal=temporal)
