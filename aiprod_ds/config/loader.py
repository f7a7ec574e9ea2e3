"""A configuration file, its bases and the command line's overrides -> one validated record, or every problem at once.

The only reader of configuration files. `document` merges, `strict_yaml` parses, `problems` words what pydantic finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.curriculum import expand_preset
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.document import Document, apply_override, read_document
from aiprod_ds.config.nearest import suggestion
from aiprod_ds.config.problems import problems_of
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.errors import ConfigError

_TRAINERS: dict[str, type[RunConfig]] = {
    "video_vae": VAETrainerConfig,
    "audio_vae": AudioVAETrainerConfig,
    "diffusion": DiffusionTrainerConfig,
}
_DEFAULT_TRAINER = "video_vae"


def load_config(path: Path, overrides: Sequence[str] = (), output_dir: str | None = None) -> RunConfig:
    """Returns the validated configuration of `path` with `overrides` applied in order.

    Args:
        path: A YAML file; its key `base` may name a file (relative to it) that it is merged over, recursively.
        overrides: `a.b=c` or `curriculum.phases[2].updates=5` each; values are YAML.
        output_dir: Replaces the key of that name.

    Raises:
        ConfigError: With one problem for every rule that is broken, as `file: dotted.path[index]: rule, got X. Fix.`
    """
    document = read_document(path)
    problems = _expand(document) + _apply(document, overrides)
    if output_dir is not None:
        document.replace(("output_dir",), output_dir, "--output-dir")
    model = _trainer(document, problems)
    try:
        config = model.model_validate(document.values)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error, model, document)]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _expand(document: Document) -> list[str]:
    curriculum: Any = document.values.get("curriculum")
    try:
        expanded = expand_preset(curriculum)
    except ValueError as error:
        document.values["curriculum"] = {key: value for key, value in curriculum.items() if key != "preset"}
        return [f"{document.origin(('curriculum', 'preset'))}: curriculum.{error}"]
    if expanded is not curriculum:
        document.values["curriculum"] = expanded
    return []


def _apply(document: Document, overrides: Sequence[str]) -> list[str]:
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(document, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def _trainer(document: Document, problems: list[str]) -> type[RunConfig]:
    name: Any = document.values.get("trainer", _DEFAULT_TRAINER)
    if isinstance(name, str) and name in _TRAINERS:
        return _TRAINERS[name]
    # The other sections are still checked, against the default trainer, so that one run shows every problem.
    document.values["trainer"] = _DEFAULT_TRAINER
    where = document.origin(("trainer",))
    problems.append(f"{where}: trainer: must be one of {sorted(_TRAINERS)}, got {name!r}. {suggestion(str(name), _TRAINERS)}")
    return _TRAINERS[_DEFAULT_TRAINER]
