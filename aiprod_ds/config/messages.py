"""Validation errors of pydantic rewritten as the project's messages: where, rule, got, fix.

Owns those words, and the guess at the name that was meant. Called by `problems.gather`; the only place that
knows pydantic's error types. Others take `suggestion` alone.
Rules and validators of our own have one problem a line, each either `field: rule, got X. Fix.` or
`rule, got X. Fix.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aiprod_ds.config.merge import KeyPath, dotted
from aiprod_ds.config.problems.meaning import meaning_of, meanings_inside, nearest
from aiprod_ds.config.problems.places import names_at

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
    "multiple_of": ("must be a multiple of {multiple_of}", "Use the nearest one."),
    "finite_number": ("must be finite", "Write a number."),
    "string_too_short": ("must not be empty", "Fill it in."),
    "string_pattern_mismatch": ("must match {pattern}", "Use only those characters."),
    "too_short": ("must have at least {min_length} entries", "Add what is missing."),
    "too_long": ("must have at most {max_length} entries", "Remove what is too much."),
}
_LISTED = 12  # more names than this make a message harder to read than the documentation


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    Attributes:
        path: Of the value that breaks it.
        words: The rule, what was got and the fix.
    """

    path: KeyPath
    words: str

    @property
    def is_missing(self) -> bool:
        """Whether nothing is at fault but that nothing was given."""
        return self.words.startswith("must be given")

    def told(self, origin: str) -> str:
        """Returns the whole message; `origin` is the file, option or class that is at fault."""
        return f"{origin}: {dotted(self.path)}: {self.words}" if self.path else f"{origin}: {self.words}"


def grouped(error: ValidationError, values: Any) -> dict[KeyPath, list[ErrorDetails]]:
    """Returns what `error` says of each path in `values`, in the order of the configuration's fields."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(_path_in(details, values), []).append(details)
    return found


def worded(path: KeyPath, group: list[ErrorDetails], schema: type[BaseModel]) -> list[Problem]:
    """Returns what is wrong at `path`, of which `group` is all that was found."""
    if len(group) > 1 and all(details["type"] in _TYPES for details in group):
        kinds = " or ".join(dict.fromkeys(_TYPES[details["type"]] for details in group))
        return [Problem(path, f"must be {kinds}, got {_shown(group[0]['input'])}. Write {kinds}.")]
    problems: list[Problem] = []
    for details in group:
        if details["type"] == "value_error":
            problems += own_problems(path, str(details["ctx"]["error"]))
        else:
            problems.append(Problem(path, _rule(path, details, schema)))
    return problems


def own_problems(path: KeyPath, text: str) -> list[Problem]:
    """Returns the problems that a rule of the record at `path` tells in the lines of `text`."""
    problems: list[Problem] = []
    for line in text.splitlines():
        match = _OWN_PATH.match(line)
        steps = re.findall(r"\w+", match[0]) if match else []
        where = (*path, *(int(step) if step.isdigit() else step for step in steps))
        problems.append(Problem(where, line[match.end() :] if match else line))
    return problems


def _path_in(details: ErrorDetails, values: Any) -> KeyPath:
    """Drops the members of a union from pydantic's location: only what `values` can hold is a path."""
    path: list[str | int] = []
    value = values
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


def _rule(path: KeyPath, details: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, context, got = details["type"], details.get("ctx", {}), _shown(details["input"])
    if kind == "missing":
        return (
            "must be given, got nothing. "
            f"{'Add it to the list.' if isinstance(path[-1], int) else f'Add `{path[-1]}:`.'}"
        )
    if kind == "extra_forbidden":
        return f"is not a known key, got {got}. {_known_fix(path, details['input'], schema)}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, got {got}. {_type_fix(kind, details['input'])}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}, got {got}. {_choice_fix(details)}"
    if kind in _RULES:
        rule, fix = _RULES[kind]
        return f"{rule.format(**context)}, got {got}. {fix}"
    return f"must be valid, got {got} ({details['msg']}). Correct the value."


def _known_fix(path: KeyPath, value: Any, schema: type[BaseModel]) -> str:
    meaning = meaning_of(schema, path, value)
    if meaning is not None:
        return meaning.words
    inside = meanings_inside(schema, path, value)
    if inside:
        return " ".join(f"Of its keys, {inner[-1]}: {found.words}" for inner, found in inside.items())
    return suggestion(str(path[-1]), names_at(schema, path[:-1]))


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


def suggestion(name: str, valid: Collection[str]) -> str:
    """Returns what to write instead of `name`: the nearest of `valid`, or all of them when none is near.

    Example: `suggestion("learnig_rate", ["learning_rate", "updates"])` is `"Did you mean 'learning_rate'?"`.
    """
    near = nearest(name, valid)
    if near is not None:
        return f"Did you mean {near!r}?"
    if not valid:
        return "Remove it."
    if len(valid) > _LISTED:
        return "Remove it or look the name up in docs/configuration.md."
    return f"Use one of: {', '.join(sorted(valid))}."
