"""A model of diffusers as a `config.json` describes it: its class, and names and shapes of its tensors
without any weights.

Called by the files beside it, for any class of diffusers, and for transformers with their family; they read
weights tensor by tensor and never hold the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import read_text
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.registry import build_model

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersModel:
    """What is known of a model without its weights.

    Attributes:
        class_name: As diffusers calls it.
        config: Text of its `config.json`.
        module: On the meta device: shapes only.
    """

    class_name: str
    config: str
    module: nn.Module

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor of its state, by name."""
        return {name: tuple(value.shape) for name, value in self.module.state_dict().items()}

    @classmethod
    def of_run(cls, config: ModelConfig) -> DiffusersModel | None:
        """Returns the model of a run's section `model`; None for a class that diffusers has not.

        Raises:
            ConfigError: If it cannot be built, for example because the folder under `pretrained` is gone.
        """
        if not _is_model_class(config.source):
            return None
        module: Any = build_model(config, seed=0, device="meta")
        return cls(class_name=type(module).__name__, config=module.to_json_string(), module=module)


def read_diffusers_config(path: Path) -> DiffusersModel:
    """Returns the model that a `config.json`, or the folder around it, describes.

    Raises:
        CheckpointError: If there is none, or its class is no model of diffusers.
        ConfigError: If the class refuses the configuration.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        text = read_text(file)
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: must be the JSON of a model of diffusers, got {error}. Name its folder."
        ) from error
    name = values.get("_class_name") if isinstance(values, dict) else None
    if not _is_model_class(name):
        raise CheckpointError(
            f"{file}: _class_name must be a model class of diffusers, got {str(name)[:80]!r}. Name its "
            "folder."
        )
    if values.pop("quantization_config", None) is not None:  # weights are written as numbers
        text = json.dumps(values, indent=2) + "\n"
    module = build_model(ModelConfig(source=str(name), pretrained=str(path)), seed=0, device="meta")
    return DiffusersModel(class_name=str(name), config=text, module=module)


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


def _is_model_class(name: Any) -> bool:
    if (
        not isinstance(name, str) or not name.isidentifier()
    ):  # an import path would run a module of someone's choice
        return False
    import diffusers  # takes seconds to import; needed only here

    found: Any = getattr(diffusers, name, None)
    return isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
