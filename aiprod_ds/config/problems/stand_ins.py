"""What may stand where a configuration is broken, so that the rest of it can still be judged.

A rule between two fields is asked with several stand-ins for the broken one: what it says each time holds
whatever was meant. Called by `gather`.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aiprod_ds.config.problems.places import Schema, field_at, without_notes

ABSENT = object()
"""Stands for a key that is left out."""
_WORD = "stand-in"
_WHOLE = (0, 1, 4, 1_000_004)  # also of sizes that must be multiples of 4
_NUMBERS = (0.0, 0.5, 1.0, 1e-6, 1e6)
_MOST = 8


def stand_ins(schema: Schema, path: tuple[str | int, ...]) -> list[Any]:
    """Returns values that `schema` takes at `path`, as a file would have them, or `ABSENT`; the default,
    which is `ABSENT`, first. Empty where the schema knows no such place."""
    field, kinds = field_at(schema, path)
    found: list[Any] = [ABSENT] if field is not None and not field.is_required() else []
    for kind, notes in kinds:
        found += [value for value in _values(kind, notes) if value not in found]
    return found[:_MOST]


def _values(annotation: Any, notes: tuple[Any, ...]) -> list[Any]:
    kind, more = without_notes(annotation)
    notes = (*notes, *more)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [value for part in arguments for value in _values(part, notes)]
    if origin is Literal:
        return list(arguments)
    if origin is dict:
        return [{}]
    if origin is tuple:
        return _lists(arguments)
    return _plain(kind, _bounds(notes))


def _lists(arguments: tuple[Any, ...]) -> list[Any]:
    if arguments[-1] is Ellipsis:
        return [[value] for value in _values(arguments[0], ())]
    entries = [_values(argument, ()) for argument in arguments]
    return [[values[0] for values in entries]] if all(entries) else []


def _plain(kind: Any, bounds: dict[str, Any]) -> list[Any]:
    if kind in (int, float):
        return [value for value in (_WHOLE if kind is int else _NUMBERS) if _is_within(value, bounds)]
    known: dict[Any, list[Any]] = {
        None: [None],
        NoneType: [None],
        bool: [False, True],
        str: [_WORD],
        Any: [_WORD],
    }
    if kind in known:
        return known[kind]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [_smallest(kind)]
    return []


def _smallest(record: type[BaseModel]) -> dict[str, Any]:
    required = {name: field for name, field in record.model_fields.items() if field.is_required()}
    given = {name: stand_ins(record, (name,)) for name in required}
    return {name: values[0] for name, values in given.items() if values}


def _bounds(notes: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for note in notes:
        if isinstance(note, FieldInfo):
            found |= _bounds(note.metadata)
        for key in ("gt", "ge", "lt", "le", "multiple_of"):
            if getattr(note, key, None) is not None:
                found[key] = getattr(note, key)
    return found


def _is_within(value: float, bounds: dict[str, Any]) -> bool:
    return bool(
        value > bounds.get("gt", -1)
        and value >= bounds.get("ge", 0)
        and value < bounds.get("lt", 1e18)
        and value <= bounds.get("le", 1e18)
        and value % bounds.get("multiple_of", 1 if isinstance(value, int) else value or 1) == 0
    )
