"""A transformer as the `config.json` of its folder describes it: shapes without weights, and its family.

Called by the conversions, which read weights tensor by tensor and never hold the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aiprod_ds.convert.diffusers_config import DiffusersModel, read_diffusers_config
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES, find_family


def describe_folder(folder: Path) -> tuple[nn.Module, Family]:
    """Returns the transformer on the meta device, and its family.

    Raises:
        CheckpointError: If there is no `config.json` of a known transformer.
        ConfigError: If the class refuses the configuration or the family the variant.
    """
    model = read_diffusers_config(folder)
    return model.module, family_of(model, where=str(folder))


def family_of(model: DiffusersModel, *, where: str) -> Family:
    """Returns the family of a transformer.

    Raises:
        CheckpointError: If it is no known transformer.
        ConfigError: If the family does not know the variant.
    """
    known = [family.transformer_class for family in FAMILIES]
    if model.class_name not in known:
        raise CheckpointError(
            f"{where}: _class_name must be a known transformer ({', '.join(known)}), got "
            f"{model.class_name!r}. "
            "Name the folder of the transformer, not of its pipeline."
        )
    return find_family(model.module, _strides(model.module))


def _strides(transformer: nn.Module) -> ModelStrides:
    """Returns what the transformer believes about its VAE, for the family to compare; nothing here depends on
    it."""
    config: Any = transformer.config
    temporal, spatial, *_ = config.get("vae_scale_factors", (1, 1))
    return ModelStrides(spatial=spatial, temporal=temporal)
