"""Rules between the fields of a record, as methods that yield what is broken.

A rule raises nothing: so all rules of a record are told, those of a record around it too, and they can be
asked of a record that breaks others. Written by the records of `aiprod_ds.config`; their base asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[[Any], Iterable[str]])

UNRULED = "unruled"
"""In the context of a validation: true leaves the rules out, which are asked afterwards."""
_MARK = "_is_rule"


def rule(method: Method) -> Method:
    """Marks a method of a record that yields one problem for each thing that is wrong between its fields.

    Each is `field: rule, got X. Fix.`, with the field's dotted path from the record on. A rule of the same
    name in a derived class takes its place. All fields are valid when it is asked, but what other rules
    demand may not hold.
    """
    setattr(method, _MARK, True)
    return method


def broken_rules(record: object) -> Iterator[str]:
    """Yields what the rules of `record` itself say, those of its base classes first; not those of records in
    it."""
    for name in _names(type(record).__mro__):
        yield from getattr(record, name)()


@cache
def _names(classes: tuple[type, ...]) -> tuple[str, ...]:
    marked = (
        name
        for owner in reversed(classes)
        for name, value in vars(owner).items()
        if getattr(value, _MARK, False) is True
    )
    return tuple(dict.fromkeys(marked))
