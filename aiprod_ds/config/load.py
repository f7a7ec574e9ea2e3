"""A trainer's configuration file, its bases and the command line's overrides -> one validated record, or every problem at once.

Owns which trainer's schema counts and the curriculum's preset. `document` merges, `validation` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.curriculum import expand_preset
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.merge import Document, apply_overrides, read_document
from aiprod_ds.config.nearest import suggestion
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.validation import validated
from aiprod_ds.config.video_vae import VAETrainerConfig

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
    problems = _expand(document) + apply_overrides(document, overrides)
    if output_dir is not None:
        document.replace(("output_dir",), output_dir, "--output-dir")
    schema = _trainer(document, problems)
    return validated(document, schema, problems)


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


def _trainer(document: Document, problems: list[str]) -> type[RunConfig]:
    name: Any = document.values.get("trainer", _DEFAULT_TRAINER)
    if isinstance(name, str) and name in _TRAINERS:
        return _TRAINERS[name]
    # The other sections are still checked, against the default trainer, so that one run shows every problem.
    document.values["trainer"] = _DEFAULT_TRAINER
    where = document.origin(("trainer",))
    problems.append(f"{where}: trainer: must be one of {sorted(_TRAINERS)}, got {name!r}. {suggestion(str(name), _TRAINERS)}")
    return _TRAINERS[_DEFAULT_TRAINER]
