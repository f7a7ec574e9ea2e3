"""A configuration before validation: plain YAML values plus, for every path, the file or option that it came
from.

Owns `base:` files, merging and `--set`. Called by `load`; knows nothing of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiprod_ds.errors import ConfigError
from aiprod_ds.files import read_whole
from aiprod_ds.shipped import lookup
from aiprod_ds.strict_yaml import MAX_BYTES, read_yaml

KeyPath = tuple[str | int, ...]

_OVERRIDE = re.compile(r"^([A-Za-z_]\w*(?:\[\d+\])*(?:\.[A-Za-z_]\w*(?:\[\d+\])*)*)=(.*)$", re.DOTALL)
_NOTHING = object()
_STEP = re.compile(r"[A-Za-z_]\w*|\d+")


@dataclass(slots=True, kw_only=True)
class Document:
    """Merged values and their origins.

    Attributes:
        origins: Path of a value -> file or option that set it; a value without an entry has that of its
            nearest ancestor. The root `()` always has one: the file that was asked for.
        problems: What was wrong in the files so far, and did not keep the rest from being read.
        is_partial: Whether a base could not be read, so that more may be set than is known.
    """

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    problems: list[str] = field(default_factory=list)
    is_partial: bool = False

    def origin(self, path: KeyPath) -> str:
        """Returns the file or option that set the value at `path`, or that of its nearest known ancestor."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def replace(self, path: KeyPath, value: Any, origin: str) -> None:
        """Puts `value` at `path`, making the mappings on the way.

        Raises:
            ConfigError: If the path runs through something that is neither a mapping nor a list with that
                index.
        """
        target: Any = self.values
        for depth, step in enumerate(path[:-1]):
            _check_step(target, path, depth, origin)
            if (
                isinstance(target, dict)
                and target.get(str(step)) is None
                and isinstance(path[depth + 1], str)
            ):
                target[str(step)] = {}
                self.origins[path[: depth + 1]] = origin
            target = target.get(str(step)) if isinstance(target, dict) else target[step]
        _check_step(target, path, len(path) - 1, origin)
        target[path[-1]] = value
        self.origins = {known: name for known, name in self.origins.items() if known[: len(path)] != path}
        self.origins[path] = origin

    def to_edit(self, path: KeyPath) -> tuple[str, str]:
        """Returns the file or option in which a rule between several values is to be kept, and a sentence
        that names the base that set the value at `path`, or nothing."""
        origin, file = self.origin(path), self.origins[()]
        is_whole = any(isinstance(step, int) for step in path)  # a list comes from one file as a whole
        if is_whole or origin == file or origin.startswith("--"):
            return origin, ""
        value: Any = self.values
        for step in path:
            value = value.get(step, _NOTHING) if isinstance(value, dict) else _NOTHING
        return file, "" if value is _NOTHING else f" It is set in {origin}."


def places_of(value: str, path: KeyPath, source: str) -> tuple[Path, ...]:
    """Returns the files from whose folders a relative path `value` at `path` is looked for: the one of the
    configuration `source` and its bases that says it, then `source` itself."""
    file = lookup.configuration(Path(source))
    try:
        document = read_document(Path(source))
    except ConfigError:
        return (file,)  # of a configuration made in Python, whose source is a name
    found: Any = document.values
    for step in path:
        found = found.get(step) if isinstance(found, dict) else None
    said_by = lookup.configuration(Path(document.origin(path)))
    return (said_by, file) if found == value and said_by != file else (file,)


def dotted(path: KeyPath) -> str:
    """Returns `path` as people write it, for example `curriculum.phases[2].updates`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def read_document(path: Path) -> Document:
    """Returns the values of the file `path` merged over its `base:` files.

    `path` may also be the name of a shipped configuration, such as `video_vae/tiny`. `base` is a path
    relative to the file that names it, or such a name. Mappings merge key by key, an empty mapping clears,
    everything else (lists too) replaces.

    Raises:
        ConfigError: If the file is missing, unreadable, empty or not a mapping. What else is wrong in it, and
            what is wrong with a base, stands in the document's `problems`.
    """
    return _read_chain(path, ())


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[str]:
    """Applies every `a.b[2].c=value` in order; the value is YAML and replaces what stood there.

    Returns:
        One problem for each that is not of that form or names a list entry that does not exist.
    """
    problems: list[str] = []
    for override in overrides:
        try:
            _apply_override(document, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def _apply_override(document: Document, override: str) -> None:
    origin = f"--set {override if len(override) <= 100 else override[:97] + '...'}"
    match = _OVERRIDE.match(override)
    if match is None:
        raise ConfigError(
            f"{origin}: must be of the form path.to.key[index]=value, got {override!r}. Write for example "
            "seed=1."
        )
    path = tuple(int(step) if step.isdigit() else step for step in _STEP.findall(match[1]))
    document.replace(path, read_yaml(match[2].encode("utf-8", "surrogatepass"), origin), "--set")


def _read_chain(path: Path, seen: tuple[Path, ...]) -> Document:
    problems: list[str] = []
    values = _read_mapping(path, problems)
    if path.resolve() in [reader.resolve() for reader in seen]:
        raise ConfigError(
            f"{seen[-1]}: base: must not lead back to a file that is being read, got {path}. Break the "
            "circle."
        )
    if "base" not in values:
        return Document(values=values, origins={(): str(path)}, problems=problems)
    document = _read_base(path, values.pop("base"), (*seen, path))
    document.problems += problems
    _merge(document, document.values, values, (), str(path))
    return document


def _read_base(path: Path, base: Any, seen: tuple[Path, ...]) -> Document:
    """Returns the document of what the file `path` names as its `base`, which is `path`'s to be merged into;
    an empty one with the problem if that cannot be read."""
    document = Document(values={}, origins={(): str(path)}, is_partial=True)
    if not isinstance(base, str) or not base:
        document.problems.append(
            f"{path}: base: must be the path of a YAML file relative to this one, got {base!r}. Name one "
            "file."
        )
        return document
    try:
        found = _read_chain(_base(path, base), seen)
    except ConfigError as error:
        document.problems += error.problems
        return document
    document.problems, document.is_partial = found.problems, found.is_partial
    document.values = found.values
    of_root = {(key,): found.origins[()] for key in found.values}
    document.origins |= of_root | {known: name for known, name in found.origins.items() if known}
    return document


def _base(path: Path, base: str) -> Path:
    """Returns the file beside `path` that its `base` names, or the shipped one of that name if none is
    there."""
    beside = lookup.configuration(path).parent / base
    shipped = None if beside.exists() else lookup.shipped_configuration(Path(base))
    return shipped or beside


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        data = read_whole(lookup.configuration(path), limit=MAX_BYTES)
    except IsADirectoryError:
        raise ConfigError(f"{path}: must be a YAML file, got a folder. Name a file in it.") from None
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: must exist, got no such file in {path.resolve().parent}, nor a shipped configuration "
            f"of that name. {lookup.instead_of(path)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: must be readable, got {error}. Check the path and its permissions."
        ) from None
    values = read_yaml(data, str(path), problems)
    if values is None:
        raise ConfigError(
            f"{path}: must hold a mapping of settings, got an empty file. Start from a file in configs/."
        )
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold a mapping of settings, got {type(values).__name__}. Write `key: value` lines."
        )
    return values


def _merge(
    document: Document, into: dict[str, Any], values: dict[str, Any], path: KeyPath, origin: str
) -> None:
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value and isinstance(into.get(key), dict):
            _merge(document, into[key], value, here, origin)
        else:
            into[key] = value
            document.origins = {
                known: name for known, name in document.origins.items() if known[: len(here)] != here
            }
            document.origins[here] = origin


def _check_step(target: Any, path: KeyPath, depth: int, origin: str) -> None:
    step, holder = path[depth], dotted(path[:depth])
    if isinstance(step, int) and not isinstance(target, list):
        rule = f"{holder} must be a list to take [{step}], got {_kind(target)}. Correct the path."
    elif isinstance(step, int) and step >= len(target):
        rule = f"{holder} must have entry [{step}], got {len(target)} counted from 0. Lower the index."
    elif isinstance(step, str) and not isinstance(target, dict):
        rule = f"{holder} must be a mapping to take {step!r}, got {_kind(target)}. Correct the path."
    else:
        return
    raise ConfigError(f"{origin}: {dotted(path)}: {rule}")


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}.get(
        type(value), repr(value)
    )
