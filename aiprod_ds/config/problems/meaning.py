"""Which key was meant by an unknown one: by what other programs call it, by where the schema has its name, or
by the nearest name.

Called by `aiprod_ds.config.messages` for the words, and by `gather`, which reads the value as that of the key
that was meant.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from aiprod_ds.config.problems.aliases import ALIASES, INSTEAD
from aiprod_ds.config.problems.places import Schema, field_at, names_at, places, records_in

KeyPath = tuple[str | int, ...]

_NEAR = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What an unknown key is for.

    Attributes:
        words: What to write, as the end of a message.
        place: The key's place in the schema; None if there is none of the same meaning.
    """

    words: str
    place: str | None = None


def meaning_of(schema: Schema, path: KeyPath, value: Any) -> Meaning | None:
    """Returns what the unknown key at `path` means, whose value is `value`; None if that is anyone's guess.

    Examples: `lr` at the top level means `learning_rate` in each phase; `training_mode` under `model` the key
    of that name at the top level; `epsilom` under `optimizer` its `epsilon`.
    """
    name, holder = str(path[-1]), _place(path[:-1])
    folded = name.lower().replace("-", "_")
    siblings = [name for name in names_at(schema, path[:-1]) if _takes(schema, (*path[:-1], name), value)]
    names = (f"{_section(holder)}.{folded}", folded)
    meant = [place for typed in names for place in ALIASES.get(typed, ())]
    for place in meant:
        if place.rpartition(".")[2] in siblings:
            return _sibling(holder, place.rpartition(".")[2])
    for place in meant:
        if place in places(schema) and _takes(schema, _steps(place), value):
            return Meaning(words=_where(place), place=place)
    if "engine" in schema.model_fields:  # a trainer's, of which alone these words are true
        for typed in names:
            if typed in INSTEAD:
                return Meaning(words=INSTEAD[typed])
    near = nearest(name, siblings)
    if near is not None:
        return _sibling(holder, near)
    elsewhere = [
        place
        for place in places(schema)
        if place.rpartition(".")[2] == name and _takes(schema, _steps(place), value)
    ]
    if elsewhere:
        place = min(elsewhere, key=lambda place: (-_shared(place, holder), place.count("."), place))
        return Meaning(words=_where(place), place=place)
    return None


def meanings_inside(schema: Schema, path: KeyPath, value: Any) -> dict[KeyPath, Meaning]:
    """Returns what the keys of an unknown section mean, by their paths; those without a meaning are left
    out."""
    inside = value if isinstance(value, dict) else {}
    found = {(*path, name): meaning_of(schema, (*path, name), entry) for name, entry in inside.items()}
    return {inner: meaning for inner, meaning in found.items() if meaning is not None}


def expanded(place: str, values: Any) -> list[KeyPath]:
    """Returns the paths of `place` in `values`, with one for each entry of a list."""
    paths: list[KeyPath] = [()]
    for part in place.split("."):
        name = part.removesuffix("[]")
        paths = [(*path, name) for path in paths]
        if part != name:
            paths = [(*path, index) for path in paths for index in range(_length(values, path))]
    return paths


def _sibling(holder: str, name: str) -> Meaning:
    return Meaning(words=f"Did you mean {name!r}?", place=f"{holder}.{name}" if holder else name)


def _where(place: str) -> str:
    holder, _, name = place.rpartition(".")
    if not holder:
        return f"Write `{name}` at the top level."
    entries, is_list, below = holder.rpartition("[]")
    if not is_list:
        return f"Write `{name}` under `{holder}`."
    each = "each phase of" if entries == "curriculum.phases" else "each entry of"
    inside = f"under `{below.removeprefix('.')}` " if below else ""
    return f"Write `{name}` {inside}in {each} `{entries}`."


def nearest(name: str, valid: Collection[str]) -> str | None:
    """Returns the one of `valid` that `name` is likely a slip of; None if none is near."""
    folded = {candidate.lower(): candidate for candidate in valid}
    close = get_close_matches(name.lower(), list(folded), n=1, cutoff=_NEAR)
    started = [candidate for candidate in folded if name and candidate.startswith(name.lower())]
    return folded[(close or started)[0]] if close or len(started) == 1 else None


def _place(path: KeyPath) -> str:
    return "".join("[]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _takes(schema: Schema, path: KeyPath, value: Any) -> bool:
    """Returns whether a section may stand at `path`, if `value` is one."""
    if not isinstance(value, dict):
        return True
    _, kinds = field_at(schema, path)
    return any(records_in(kind) or "dict" in str(kind) for kind, _ in kinds)


def _steps(place: str) -> KeyPath:
    return tuple(
        step for part in place.split(".") for step in (part.removesuffix("[]"), 0)[: 1 + part.endswith("[]")]
    )


def _section(holder: str) -> str:
    return holder.rpartition(".")[2].removesuffix("[]")


def _shared(place: str, holder: str) -> int:
    pairs = zip(place.split("."), holder.split("."), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(holder.split(".")))


def _length(values: Any, path: KeyPath) -> int:
    for step in path:
        values = (
            values.get(step) if isinstance(values, dict) else values[step] if isinstance(step, int) else None
        )
    return len(values) if isinstance(values, list) else 0
