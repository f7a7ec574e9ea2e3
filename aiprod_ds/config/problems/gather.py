"""All problems of a configuration in one pass: what is wrong in its values, and what rules say of the rest.

A broken value hides nothing: it is told, something takes its place, and the rules are asked all the same, of
every record and of those around it. Called by `aiprod_ds.config.load` and by the records' base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from aiprod_ds.config.merge import KeyPath
from aiprod_ds.config.messages import Problem, grouped, own_problems, worded
from aiprod_ds.config.problems.meaning import Meaning, expanded, meaning_of, meanings_inside
from aiprod_ds.config.problems.places import field_at, records_in
from aiprod_ds.config.problems.rules import UNRULED, broken_rules
from aiprod_ds.config.problems.stand_ins import ABSENT, stand_ins
from aiprod_ds.errors import ConfigError
from aiprod_ds.strict_yaml import UNREAD

Record = TypeVar("Record", bound=BaseModel)

_MOST_ROUNDS = 24  # each makes room for what was hidden behind the last
_NOTHING: dict[str, bool] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined(Generic[Record]):
    """What was found.

    Attributes:
        record: With stand-ins for what is broken; it may break rules. None if there is none.
        problems: All of them, those of single values first.
        of_rules: Those of them that rules between values told.
    """

    record: Record | None
    problems: tuple[Problem, ...]
    of_rules: frozenset[Problem]


def examine(
    schema: type[Record],
    values: Mapping[str, Any],
    context: Mapping[str, bool] | None = None,
    *,
    is_partial: bool = False,
) -> Examined[Record]:
    """Returns every problem that `values` have as a record of class `schema`.

    Args:
        schema: The class.
        values: As a file or the arguments of the class give them.
        context: Of the validation.
        is_partial: Whether a part of the values is not known: then nothing is missing, and only rules inside
            lists, which are given as a whole, are asked.
    """
    examination = _Examination(schema, _plain(dict(values)), {**(context or _NOTHING), UNRULED: True})
    record = examination.repaired()
    told = [found for found in examination.told if not (is_partial and found.is_missing)]
    rules = [] if record is None else examination.rules(record)
    if is_partial:
        rules = [found for found in rules if any(isinstance(step, int) for step in found.path)]
    rules = [found for found in rules if found not in told]
    return Examined(record=record, problems=(*told, *rules), of_rules=frozenset(rules))


def problems_in_code(schema: type[BaseModel], values: Mapping[str, Any]) -> ConfigError:
    """Returns the error of `values` that a program made a record of; messages begin with the class's name."""
    found = examine(schema, values)
    return ConfigError([problem.told(schema.__name__) for problem in found.problems])


class _Examination(Generic[Record]):
    """One pass over values that it changes.

    Attributes:
        told: The problems of single values so far.
        broken: What may stand at each broken path; the first stands there.
        typed: Where the value of a key stood that was read as that of another.
    """

    def __init__(self, schema: type[Record], values: dict[str, Any], context: Mapping[str, bool]) -> None:
        self.schema, self.values, self.context = schema, values, context
        self.told: list[Problem] = []
        self.broken: dict[KeyPath, list[Any]] = {}
        self.typed: dict[KeyPath, KeyPath] = {}
        for path in _unread(self.values, ()):
            if not self._replace(path):  # in a mapping that takes anything
                self.broken.pop(path, None)
                _remove(self.values, path)

    def repaired(self) -> Record | None:
        """Returns a record of values that are all valid; None if nothing valid is known for some of them."""
        for _ in range(_MOST_ROUNDS):
            record, error = self._validated(self.values)
            if error is None:
                return record
            found = grouped(error, self.values)
            if any(group[0]["type"] == "extra_forbidden" for group in found.values()):
                # What seems to be missing may be there under another name.
                found = {path: group for path, group in found.items() if group[0]["type"] != "missing"}
            is_lost = False
            for path, group in found.items():
                self._tell(path, worded(path, group, self.schema))
                if group[0]["type"] == "extra_forbidden":
                    self._read_as_meant(path, group[0]["input"])
                elif not self._replace(path):
                    is_lost = True
            if is_lost:
                return None
        return None

    def rules(self, record: Record) -> list[Problem]:
        """Returns what rules say of `record`, and say whatever stands at the broken paths."""
        problems = self._asked(record)
        for turn in range(1, max((len(values) for values in self.broken.values()), default=1)):
            other, _ = self._validated(self._with_others(turn))
            if other is not None:
                same = set(self._asked(other))
                problems = [problem for problem in problems if problem in same]
        return list(dict.fromkeys(Problem(self._as_typed(found.path), found.words) for found in problems))

    def _validated(self, values: dict[str, Any]) -> tuple[Record | None, ValidationError | None]:
        try:
            return self.schema.__pydantic_validator__.validate_python(
                values, context=dict(self.context)
            ), None
        except ValidationError as error:
            return None, error

    def _asked(self, record: Record) -> list[Problem]:
        return [
            problem
            for path, part in _records(record, ())
            for text in broken_rules(part)
            for problem in own_problems(path, text)
            if not self._is_made_up(problem.path)
        ]

    def _is_made_up(self, path: KeyPath) -> bool:
        return any(path[: len(broken)] == broken for broken in self.broken)

    def _tell(self, path: KeyPath, problems: Sequence[Problem]) -> None:
        if self._is_made_up(path):
            return  # of a stand-in
        for problem in problems:
            as_typed = Problem(self._as_typed(problem.path), problem.words)
            if as_typed not in self.told:
                self.told.append(as_typed)

    def _as_typed(self, path: KeyPath) -> KeyPath:
        for target, typed in self.typed.items():
            if path[: len(target)] == target:
                return (*typed, *path[len(target) :])
        return path

    def _read_as_meant(self, path: KeyPath, value: Any) -> None:
        _remove(self.values, path)
        meaning = meaning_of(self.schema, path, value)
        meanings = meanings_inside(self.schema, path, value) if meaning is None else {path: meaning}
        for typed, found in meanings.items():
            self._move(typed, value if typed == path else value[typed[-1]], found)

    def _move(self, typed: KeyPath, value: Any, meaning: Meaning) -> None:
        if meaning.place is None:
            return
        for target in self._targets(typed, meaning.place):
            _, kinds = field_at(self.schema, target)
            takes_records = any(records_in(kind) for kind, _ in kinds)
            if (takes_records or not isinstance(value, (dict, list))) and _set(self.values, target, value):
                self.typed[target] = self._as_typed(typed)

    def _targets(self, typed: KeyPath, place: str) -> list[KeyPath]:
        """Returns where the value belongs: of lists, in the entry that it was typed in, or in all."""
        found = expanded(place, self.values)
        return [target for target in found if not _part_at_entries(target, typed)]

    def _replace(self, path: KeyPath) -> bool:
        if not path:
            return False  # a validator of a derived class, which is no rule
        if path in self.broken:
            self.broken[path] = self.broken[path][1:]  # the schema did not take the first
        else:
            self.broken[path] = stand_ins(self.schema, path)
        return bool(self.broken[path]) and _put(self.values, path, self.broken[path][0])

    def _with_others(self, turn: int) -> dict[str, Any]:
        values: dict[str, Any] = _plain(self.values)
        for path, found in self.broken.items():
            _put(values, path, found[turn % len(found)])
        return values


def _records(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, BaseModel]]:
    """Yields every record in `value`, the inner ones first, with its path."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _records(getattr(value, name), (*path, name))
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _records(entry, (*path, index))


def _unread(value: Any, path: KeyPath) -> list[KeyPath]:
    if value is UNREAD:
        return [path]
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [found for step, entry in entries for found in _unread(entry, (*path, step))]


def _part_at_entries(first: KeyPath, second: KeyPath) -> bool:
    steps = next(((a, b) for a, b in zip(first, second, strict=False) if a != b), (None, None))
    return all(isinstance(step, int) for step in steps)


def _plain(value: Any) -> Any:
    """Returns a copy of mappings and lists; tuples become lists, as in a file."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _holder(values: Any, path: KeyPath) -> Any:
    for step in path[:-1]:
        if isinstance(step, str):
            values = values.get(step) if isinstance(values, dict) else None
        else:
            values = values[step] if isinstance(values, list) and step < len(values) else None
    return values


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    holder = _holder(values, path)
    if isinstance(holder, dict):
        holder.pop(path[-1], None)


def _set(values: dict[str, Any], path: KeyPath, value: Any) -> bool:
    """Puts `value` at `path` if nothing stands there, making sections on the way; returns whether it did."""
    target: Any = values
    for step in path[:-1]:
        if isinstance(step, str):
            target = target.setdefault(step, {}) if isinstance(target, dict) else None
        else:
            target = target[step] if isinstance(target, list) else None
    if not isinstance(target, dict) or path[-1] in target:
        return False
    target[str(path[-1])] = value
    return True


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> bool:
    """Puts a stand-in in the place of what is there, and returns whether there is such a place."""
    holder = _holder(values, path)
    if isinstance(holder, dict):
        if value is ABSENT:
            holder.pop(path[-1], None)
        else:
            holder[path[-1]] = _plain(value)
        return True
    if not isinstance(holder, list) or not isinstance(path[-1], int):
        return False
    holder[path[-1] : path[-1] + 1] = [_plain(value)]
    return True
