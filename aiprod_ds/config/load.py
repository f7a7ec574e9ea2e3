"""A configuration file, its bases and the command line's overrides -> one validated record, or every problem
at once.

Owns which kind a file is (a trainer's, of `encode` or of `sample`), which trainer's schema counts, and the
curriculum's preset. `merge` reads and merges the values before, `messages` words what pydantic finds.
Called by the command line, the launcher, conversions and encoding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from aiprod_ds.config.curriculum import CurriculumConfig, expand_preset
from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.config.diffusion import DiffusionModelConfig, adapters_of
from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.config.merge import Document, apply_overrides, places_of, read_document
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.phase import PhaseConfig, TrainingMode
from aiprod_ds.config.problems.gather import examine
from aiprod_ds.config.problems.meaning import nearest
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.sample import SampleConfig
from aiprod_ds.config.schema import TRUST_CODE, Fraction, Seed, untrusted
from aiprod_ds.config.trainers import DEFAULT_TRAINER, TRAINERS, trainer_config_class
from aiprod_ds.errors import ConfigError
from aiprod_ds.shipped import lookup

ConfigKind = Literal["trainer", "encode", "sample"]
# Keys that the other kinds do not have; an encode file's `curriculum` is also a trainer's section.
_OWN_KEYS: tuple[tuple[ConfigKind, frozenset[str]], ...] = (
    ("trainer", frozenset({"trainer", "optimizer", "loss", "engine", "checkpoint", "evaluation"})),
    ("sample", frozenset({"prompts", "sampling", "duration", "resolution"})),
    ("encode", frozenset({"video", "audio", "text", "shapes"})),
)
Record = TypeVar("Record", bound=BaseModel)
Data = TypeVar("Data", bound=ClipDataConfig)


def load_config(
    path: Path, overrides: Sequence[str] = (), output_dir: str | None = None, *, trust_code: bool = False
) -> RunConfig:
    """Returns the validated configuration of `path` with `overrides` applied in order.

    Args:
        path: A YAML file; its key `base` may name a file (relative to it) that it is merged over,
            recursively.
        overrides: `a.b=c` or `curriculum.phases[2].updates=5` each; values are YAML.
        output_dir: Replaces the key of that name.
        trust_code: Whether it may name code outside of the installed packages; `trust_code: true` in the file
            says so, too.

    Raises:
        ConfigError: With one problem for every rule that is broken, as
            `file: dotted.path[index]: rule, got X. Fix.`
    """
    return read_config(path, overrides, output_dir, trust_code=trust_code).sound()


def read_config(
    path: Path, overrides: Sequence[str] = (), output_dir: str | None = None, *, trust_code: bool = False
) -> Reading[RunConfig]:
    """Returns what `load_config` would, with its problems in place of an error, so that what needs the model
    or the data can be checked as well where their sections are sound.

    Raises:
        ConfigError: If the file itself cannot be read.
    """
    document = read_document(path)
    problems = _expand(document) + apply_overrides(document, overrides)
    if output_dir is not None:
        document.replace(("output_dir",), output_dir, "--output-dir")
    is_trusted = _take_trust(document, problems, by_option=trust_code)
    schema = _trainer(document, problems, is_trusted=is_trusted)
    found = _reading(document, schema, problems, context={TRUST_CODE: is_trusted})
    # The trainer that is likely meant stands in the record.
    is_guessed = isinstance(document.values.get("trainer"), _Guess)
    return replace(found, unsound=found.unsound - {"trainer"}) if is_guessed else found


class _Guess(str):
    """The name of a trainer in place of one that is near it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[Record]):
    """A configuration as far as it can be read.

    Attributes:
        record: With stand-ins where something is broken; None if there is nothing valid to stand in.
        problems: All of them, as messages.
        unsound: Sections at the top level that have a problem; `""` stands for the whole.
    """

    record: Record | None
    problems: tuple[str, ...]
    unsound: frozenset[str]

    def sound(self) -> Record:
        """Returns the record.

        Raises:
            ConfigError: If there is a problem.
        """
        if self.problems or self.record is None:
            raise ConfigError(self.problems)
        return self.record

    def is_sound(self, *sections: str) -> bool:
        """Returns whether the record says of these sections what the file does."""
        return self.record is not None and not self.unsound & {"", *sections}


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


def _take_trust(document: Document, problems: list[str], *, by_option: bool) -> bool:
    """Takes `trust_code` out of the document, to which it is what `base` is, and returns whether code is
    trusted."""
    value = document.values.pop(TRUST_CODE, False)
    if not isinstance(value, bool):
        problems.append(
            f"{document.origin((TRUST_CODE,))}: {TRUST_CODE}: must be true or false, got "
            f"{str(value)[:80]!r}. Correct the value."
        )
    return by_option or value is True


def _trainer(document: Document, problems: list[str], *, is_trusted: bool) -> type[RunConfig]:
    trainer = document.values.get("trainer", DEFAULT_TRAINER)
    problem = None if is_trusted or not isinstance(trainer, str) else untrusted(trainer)
    try:
        if problem is None:
            return trainer_config_class(trainer)
        found = [f"trainer: {problem}"]
    except ConfigError as error:
        found = list(error.problems)
    problems += [f"{document.origin(('trainer',))}: {problem}" for problem in found]
    # The other sections are still checked, as those of the trainer that is likely meant.
    meant = nearest(str(trainer), TRAINERS)
    document.values["trainer"] = DEFAULT_TRAINER if meant is None else _Guess(meant)
    return TRAINERS[meant or DEFAULT_TRAINER].config_class


def load_encode_config(
    path: Path, overrides: Sequence[str] = (), output_dir: str | None = None, *, trust_code: bool = False
) -> EncodeConfig:
    """Returns the validated configuration of `path`; arguments and messages are those of
    `load_config`.

    Args:
        path: A YAML file, which may have a `base`.
        overrides: `data.num_workers=4` and the like.
        output_dir: Replaces `data.output_dir`.
        trust_code: As of `load_config`.

    Raises:
        ConfigError: With one problem for every rule that is broken.
    """
    document = read_document(path)
    problems = apply_overrides(document, overrides)
    if output_dir is not None:
        document.replace(("data", "output_dir"), output_dir, "--output-dir")
    _find_media(document)
    is_trusted = _take_trust(document, problems, by_option=trust_code)
    return validated(document, EncodeConfig, problems, context={TRUST_CODE: is_trusted})


def _find_media(document: Document) -> None:
    """Replaces what `encode` reads by where it is, if that is not the working folder: nothing of an encode
    file is hashed."""
    data = document.values.get("data")
    section = data if isinstance(data, dict) else {}
    for values, path in ((section, ("data", "media")), (document.values, ("curriculum",))):
        given = values.get(path[-1])
        if isinstance(given, str) and lookup.shipped_configuration(Path(given)) is None:
            file = lookup.configuration(Path(document.origin(path)))
            found = lookup.media(given, lookup.searched(file))
            values[path[-1]] = given if found is None else str(found)


def found_data(data: Data, source: str) -> Data:
    """Returns a trainer's section `data` with its relative paths replaced by where they lead from the working
    folder, the file that names them, the configuration `source` or what is shipped; those that lead nowhere
    stay.

    The configuration itself keeps what was typed: its fingerprint is the same wherever the files lie.
    """
    update = {}
    for key in ("train", "validation"):
        given = getattr(data, key)
        if given is not None and "://" not in given:
            found = lookup.media(given, lookup.searched(*places_of(given, ("data", key), source)))
            update[key] = given if found is None else str(found)
    return data.model_copy(update=update)


def read_curriculum(path: Path) -> CurriculumConfig:
    """Returns the section `curriculum` of a trainer's YAML file; the rest of the file is not looked at.

    Raises:
        ConfigError: If the file cannot be read or has no such section, with one problem for every rule that
            the section breaks.
    """
    return validated(read_document(path), _CurriculumFile).curriculum


class _CurriculumFile(BaseModel):
    curriculum: CurriculumConfig


class HoldoutFile(BaseModel):
    """What a trainer's file says of clips that are held out, whichever trainer it is of."""

    class Data(BaseModel):
        """The part of `data` that says which."""

        validation: str | None = None
        holdout_fraction: Fraction = ClipDataConfig.model_fields["holdout_fraction"].default

    seed: Seed = RunConfig.model_fields["seed"].default
    data: Data = Data()


def read_holdout(path: Path) -> HoldoutFile:
    """Returns which clips the training of a trainer's YAML file holds out.

    Raises:
        ConfigError: If the file cannot be read, or one of these values is wrong.
    """
    document = read_document(path)
    return validated(document, HoldoutFile)


def read_saved_run(path: Path) -> SavedRun:
    """Returns what a conversion needs of the `config.yaml` in a run folder, whichever trainer wrote it.

    Nothing that the file names is imported: the folder may be someone else's.

    Raises:
        ConfigError: If the file cannot be read or one of the sections is broken, with one problem for every
            rule.
    """
    document = read_document(path)
    return validated(document, SavedRun, _expand(document))


class _SavedModel(DiffusionModelConfig, extra="ignore"):
    """The section `model` of any trainer: its keys are those of all models, a transformer's, or a user's
    own."""


class SavedRun(BaseModel):
    """The sections of a finished run that say which model it trained, and with which adapters."""

    model: _SavedModel
    curriculum: CurriculumConfig
    training_mode: TrainingMode = "full"
    lora: LoraConfig | None = None

    def phase_adapters(self, phase: PhaseConfig) -> LoraConfig | None:
        """Returns the adapters that `phase` trained; None if it trained the weights themselves."""
        return adapters_of(phase, training_mode=self.training_mode, lora=self.lora)


def load_sample_config(
    path: Path, overrides: Sequence[str] = (), output_dir: str | None = None, *, trust_code: bool = False
) -> SampleConfig:
    """Returns the validated configuration of `path`; arguments and messages are those of
    `load_config`.

    Args:
        path: A YAML file, which may have a `base`.
        overrides: `seed=4` and the like.
        output_dir: Replaces the key of that name.
        trust_code: As of `load_config`.

    Raises:
        ConfigError: With one problem for every rule that is broken.
    """
    document = read_document(path)
    problems = apply_overrides(document, overrides)
    if output_dir is not None:
        document.replace(("output_dir",), output_dir, "--output-dir")
    is_trusted = _take_trust(document, problems, by_option=trust_code)
    return validated(document, SampleConfig, problems, context={TRUST_CODE: is_trusted})


def config_kind(path: Path, overrides: Sequence[str] = ()) -> ConfigKind:
    """Returns the kind of the file, with its `base` files and overrides.

    Raises:
        ConfigError: If it cannot be read.
    """
    document = read_document(path)
    apply_overrides(document, overrides)  # the kind's own reader tells what is wrong with them
    return next((kind for kind, keys in _OWN_KEYS if keys & document.values.keys()), "trainer")


def validated(
    document: Document,
    schema: type[Record],
    problems: Sequence[str] = (),
    *,
    context: Mapping[str, bool] | None = None,
) -> Record:
    """Returns the record of class `schema` that `document` holds.

    Args:
        document: With the command line's overrides applied.
        schema: The class of the record.
        problems: What was found wrong before; it is raised together with what is wrong here.
        context: Whether code is trusted; see `schema`. None: it is not imported.

    Raises:
        ConfigError: With `problems` and one more for every rule that is broken.
    """
    return _reading(document, schema, problems, context=context).sound()


def _reading(
    document: Document,
    schema: type[Record],
    problems: Sequence[str],
    *,
    context: Mapping[str, bool] | None,
) -> Reading[Record]:
    found = examine(schema, document.values, context, is_partial=document.is_partial)
    told = []
    for problem in found.problems:
        origin, note = document.origin(problem.path), ""
        if problem in found.of_rules or problem.is_missing:
            origin, note = document.to_edit(problem.path)
        told.append(problem.told(origin) + note)
    before = [*document.problems, *problems]
    sections = {str(step) for problem in found.problems for step in (*problem.path[:1], "")[:1]}
    sections |= {section for problem in before for section in _sections_of(problem, schema)}
    return Reading(
        record=found.record,
        problems=(*before, *told),
        unsound=frozenset(sections | ({""} if document.is_partial else set())),
    )


def _sections_of(problem: str, schema: type[BaseModel]) -> set[str]:
    """Returns the sections that a message is of, which names the path behind the file."""
    words = set(re.findall(r"\w+", problem.partition(": ")[2].partition(": ")[0]))
    return words & set(schema.model_fields)
