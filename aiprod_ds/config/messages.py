"""Validation errors of pydantic rewritten as the project's messages: where, rule, got, fix.

Owns those words, and the guess at the name that was meant. Called by `load` with the schema and the document;
the only place that knows pydantic's error types. Others take `suggestion` alone.
Validators of our own raise `ValueError` with one problem a line, each either `field: rule, got X. Fix.` or
`rule, got X. Fix.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aiprod_ds.config.merge import Document, KeyPath, dotted

_OWN_PATH = re.compile(r"^[A-Za-z_]\w*(?:\[\d+\])*(?:\.\w+(?:\[\d+\])*)*: ")
_NUMBER = re.compile(r"^[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?$")
_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_RULES = {  # kind -> rule and fix, filled with pydantic's own numbers
    "greater_than": ("must be > {gt}", "Use a larger value."),
    "greater_than_equal": ("must be >= {ge}", "Use a larger value."),
    "less_than": ("must be < {lt}", "Use a smaller value."),
    "less_than_equal": ("must be <= {le}", "Use a smaller value."),
    "finite_number": ("must be finite", "Write a number."),
    "string_too_short": ("must not be empty", "Fill it in."),
    "string_pattern_mismatch": ("must match {pattern}", "Use only those characters."),
    "too_short": ("must have at least {min_length} entries", "Add what is missing."),
    "too_long": ("must have at most {max_length} entries", "Remove what is too much."),
}
_LISTED = 12  # more names than this make a message harder to read than the documentation


def problems_of(error: ValidationError, model: type[BaseModel], document: Document) -> list[str]:
    """Returns one message for every broken rule in `error`, in the order of the configuration's fields."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        grouped.setdefault(_path_in(details, document), []).append(details)
    problems: list[str] = []
    for path, group in grouped.items():
        for where, message in _messages(path, group, model):
            problems.append(f"{document.origin(where)}: {dotted(path)}{message}".replace(": : ", ": ", 1))
    return problems


def names_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """Returns the keys that the schema knows at `path`; empty where it takes anything."""
    classes: list[Any] = [model]
    for step in path:
        if isinstance(step, int):
            continue  # `_records` has already looked inside lists
        classes = [
            found
            for cls in classes
            if step in cls.model_fields
            for found in _records(cls.model_fields[step].annotation)
        ]
    return [name for cls in classes for name in cls.model_fields]


def _path_in(details: ErrorDetails, document: Document) -> KeyPath:
    """Drops the members of a union from pydantic's location: only what the document can hold is a path."""
    path: list[str | int] = []
    value: Any = document.values
    steps = details["loc"]
    for index, step in enumerate(steps):
        if isinstance(value, dict) and step in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        elif details["type"] != "missing" or index < len(steps) - 1:
            continue
        path.append(step)
    return tuple(path)


def _messages(path: KeyPath, group: list[ErrorDetails], model: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    if len(group) > 1 and all(details["type"] in _TYPES for details in group):
        kinds = " or ".join(dict.fromkeys(_TYPES[details["type"]] for details in group))
        return [(path, f": must be {kinds}, got {_shown(group[0]['input'])}. Write {kinds}.")]
    messages: list[tuple[KeyPath, str]] = []
    for details in group:
        if details["type"] == "value_error":
            messages += _own_messages(path, str(details["ctx"]["error"]))
        else:
            messages.append((path, f": {_rule(path, details, model)}"))
    return messages


def _own_messages(path: KeyPath, text: str) -> list[tuple[KeyPath, str]]:
    messages: list[tuple[KeyPath, str]] = []
    for line in text.splitlines():
        match = _OWN_PATH.match(line)
        steps = re.findall(r"\w+", match[0]) if match else []
        where = (*path, *(int(step) if step.isdigit() else step for step in steps))
        joint = "." if match and path else ": "
        messages.append((where, f"{joint}{line}"))
    return messages


def _rule(path: KeyPath, details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context, got = details["type"], details.get("ctx", {}), _shown(details["input"])
    if kind == "missing":
        return (
            "must be given, got nothing. "
            f"{'Add it to the list.' if isinstance(path[-1], int) else f'Add `{path[-1]}:`.'}"
        )
    if kind == "extra_forbidden":
        return f"is not a known key, got {got}. {suggestion(str(path[-1]), names_at(model, path[:-1]))}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, got {got}. {_type_fix(kind, details['input'])}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}, got {got}. {_choice_fix(details)}"
    if kind in _RULES:
        rule, fix = _RULES[kind]
        return f"{rule.format(**context)}, got {got}. {fix}"
    return f"must be valid, got {got} ({details['msg']}). Correct the value."


def _type_fix(kind: str, value: Any) -> str:
    if kind in ("tuple_type", "list_type"):
        return "Write [..] or lines that start with `-`."
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "Write `key: value` lines under it."
    if kind == "string_type":
        return f'Quote it: "{value}".' if isinstance(value, (int, float, bool)) else "Write text."
    is_quoted = isinstance(value, str) and _NUMBER.match(value) is not None
    return "Remove the quotes." if is_quoted else "Correct the value."


def _choice_fix(details: ErrorDetails) -> str:
    names = re.findall(r"'([^']*)'", str(details.get("ctx", {})["expected"]))
    hint = suggestion(str(details["input"]), names)
    return hint if hint.startswith("Did you mean") else "Use one of these."


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _records(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _records(argument)]


def suggestion(name: str, valid: Collection[str]) -> str:
    """Returns what to write instead of `name`: the nearest of `valid`, or all of them when none is near.

    Example: `suggestion("learnig_rate", ["learning_rate", "updates"])` is `"Did you mean 'learning_rate'?"`.
    """
    folded = {candidate.lower(): candidate for candidate in valid}
    close = get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    started = [candidate for candidate in folded if name and candidate.startswith(name.lower())]
    if close or len(started) == 1:
        return f"Did you mean {folded[(close or started)[0]]!r}?"
    if not valid:
        return "Remove it."
    if len(valid) > _LISTED:
        return "Remove it or look the name up in docs/configuration.md."
    return f"Use one of: {', '.join(sorted(valid))}."
