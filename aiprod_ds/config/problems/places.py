"""Where a schema has which key, and what a key may hold: what messages and stand-ins ask of records.

A place is written as people do, with `[]` for each entry of a list: `curriculum.phases[].learning_rate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Schema = type[BaseModel]


def names_at(schema: Schema, path: Iterable[str | int]) -> list[str]:
    """Returns the keys that `schema` knows at `path`; empty where it takes anything."""
    classes: list[Schema] = [schema]
    for step in path:
        if isinstance(step, int):
            continue  # `records_in` has already looked inside lists
        classes = [found for field in _fields(classes, step) for found in records_in(field.annotation)]
    return [name for cls in classes for name in cls.model_fields]


Kind = tuple[Any, tuple[Any, ...]]
"""A type, and what a field notes beside it, such as bounds."""


def field_at(schema: Schema, path: Iterable[str | int]) -> tuple[FieldInfo | None, list[Kind]]:
    """Returns the field at `path`, or None for an entry of a list, and the types that may stand there."""
    field: FieldInfo | None = None
    found: list[Kind] = [(schema, ())]
    for step in path:
        if isinstance(step, int):
            found, field = [(entry, ()) for kind, _ in found for entry in _entries(kind, step)], None
        else:
            fields = _fields([record for kind, _ in found for record in records_in(kind)], step)
            field = fields[0] if fields else None
            found = [] if field is None else [(field.annotation, tuple(field.metadata))]
    return field, found


@cache
def places(schema: Schema) -> tuple[str, ...]:
    """Returns all places of `schema`, from the top down."""
    return tuple(_places(schema, ""))


def records_in(annotation: Any) -> list[Schema]:
    """Returns the classes of records that `annotation` holds, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in records_in(argument)]


def without_notes(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the type inside `Annotated[...]`, and what is noted beside it."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    kind, *notes = get_args(annotation)
    inner, more = without_notes(kind)
    return inner, (*more, *notes)


def _places(schema: Schema, prefix: str) -> Iterator[str]:
    below: list[tuple[Schema, str]] = []
    for name, field in schema.model_fields.items():
        yield prefix + name
        for kind in _alternatives(field.annotation):
            mark = "[]" if get_origin(kind) in (tuple, list) else ""
            below += [(record, f"{prefix}{name}{mark}.") for record in records_in(kind)]
    for record, where in below:
        yield from _places(record, where)


def _fields(classes: Iterable[Schema], name: str) -> list[FieldInfo]:
    return [cls.model_fields[name] for cls in classes if name in cls.model_fields]


def _alternatives(annotation: Any) -> list[Any]:
    kind, _ = without_notes(annotation)
    origin = get_origin(kind)
    is_one = origin is None or (isinstance(origin, type) and origin in (tuple, list, dict, type))
    return [kind] if is_one else [found for part in get_args(kind) for found in _alternatives(part)]


def _entries(annotation: Any, index: int) -> Iterator[Any]:
    for kind in _alternatives(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is tuple and arguments:
            yield arguments[0] if arguments[-1] is Ellipsis else arguments[min(index, len(arguments) - 1)]
