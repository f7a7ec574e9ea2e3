"""Which trainers there are: the one list of names, and what a user's own trainer must be.

Owns the way from `trainer` in a configuration to two classes: the configuration's, which is needed to read
the file, and the trainer's, which loads torch and is therefore named by its import path. Called by
`load`, which asks for the first, and by the command line, which asks for the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.messages import suggestion
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.import_path import import_object

DEFAULT_TRAINER = "video_vae"
_BASE = "aiprod_ds.trainers.base:Trainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTrainer:
    """A trainer that has a name of its own.

    Attributes:
        path: Import path of its class.
        config_class: What the class states as its `config_class`; here, so that a file is read without torch.
    """

    path: str
    config_class: type[RunConfig]


TRAINERS: Mapping[str, NamedTrainer] = {
    "video_vae": NamedTrainer(
        path="aiprod_ds.trainers.video_vae:VideoVAETrainer", config_class=VAETrainerConfig
    ),
    "audio_vae": NamedTrainer(
        path="aiprod_ds.trainers.audio_vae:AudioVAETrainer", config_class=AudioVAETrainerConfig
    ),
    "diffusion": NamedTrainer(
        path="aiprod_ds.trainers.diffusion:DiffusionTrainer", config_class=DiffusionTrainerConfig
    ),
}


def trainer_config_class(trainer: Any) -> type[RunConfig]:
    """Returns the class of the configuration that `trainer` names.

    Args:
        trainer: What stands in the file: a name, or the import path of a class derived from `Trainer`, which
            is imported then.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(trainer, str) and trainer in TRAINERS:
        return TRAINERS[trainer].config_class
    if isinstance(trainer, str) and ":" in trainer:
        found: type[RunConfig] = _own_trainer(trainer).config_class
        return found
    raise ConfigError(
        f"trainer: must be one of {sorted(TRAINERS)}, got {trainer!r}. {suggestion(str(trainer), TRAINERS)}"
    )


def trainer_class(trainer: str) -> Any:
    """Returns the class of the trainer, to be called with `config` and `source`; loads torch.

    Args:
        trainer: `RunConfig.trainer` of a configuration that was loaded.

    Raises:
        ConfigError: As `trainer_config_class`.
    """
    if trainer in TRAINERS:
        return import_object(TRAINERS[trainer].path, key="trainer")
    return _own_trainer(trainer)


def _own_trainer(path: str) -> Any:
    found: Any = import_object(path, key="trainer")
    base: Any = import_object(_BASE, key="trainer")
    if not (isinstance(found, type) and issubclass(found, base)):
        name = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ConfigError(
            f"trainer: must be a class derived from Trainer of aiprod_ds.trainers.base, got {name} from "
            f"{path!r}. Derive it, for example from VideoVAETrainer."
        )
    missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
    if missing:
        raise ConfigError(
            f"trainer: must have all methods of Trainer, got {path!r} without {missing}. Add them, or derive "
            "it from VideoVAETrainer, AudioVAETrainer or DiffusionTrainer."
        )
    config_class = getattr(found, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, RunConfig)):
        raise ConfigError(
            "trainer: must state its configuration's class, derived from RunConfig, as config_class, got "
            f"{config_class!r} from {path!r}. Add it."
        )
    try:
        inspect.signature(found).bind(config=None, source="")
    except TypeError as error:
        raise ConfigError(
            f"trainer: must be made of config and source alone, got {path!r}, which refuses them ({error}). "
            "Give its other arguments defaults."
        ) from error
    return found
