"""A transformer as the `config.json` of its folder describes it: shapes without weights, and its family.

Called by the conversions, which read weights tensor by tensor and never hold the model.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from aiprod_ds.convert.diffusers_config import DiffusersModel, read_diffusers_config
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.protocol import Family


def describe_folder(folder: Path) -> tuple[nn.Module, type[Family]]:
    """Returns the transformer on the meta device, and its family.

    Raises:
        CheckpointError: If there is no `config.json` of a known transformer.
        ConfigError: If the class refuses the configuration.
    """
    model = read_diffusers_config(folder)
    return model.module, family_of(model, where=str(folder))


def family_of(model: DiffusersModel, *, where: str) -> type[Family]:
    """Returns the family of a transformer, which may be a variant that is not trained: names are the same.

    Raises:
        CheckpointError: If it is no known transformer.
    """
    for family in registry.FAMILIES:
        if family.transformer_class == model.class_name:
            return family
    known = ", ".join(family.transformer_class for family in registry.FAMILIES)
    raise CheckpointError(
        f"{where}: _class_name must be a known transformer ({known}), got {model.class_name!r}. "
        "Name the folder of the transformer, not of its pipeline."
    )
