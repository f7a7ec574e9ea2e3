"""YAML read without its traps: one document of plain values, duplicate keys refused, numbers as people write
them.

Differences from PyYAML's YAML 1.1: `1e-4` is a number; `on`, `off`, `yes`, `no` and dates are text; `017`
(octal in 1.1) is refused, because readers disagree about it; anchors, aliases and tags are refused, because
`base:` does their work without hidden sharing. `1_000` and `0x10` stay integers. Called by `merge`,
and by `fingerprint` to write; knows nothing of the schema.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from aiprod_ds.errors import ConfigError

MAX_BYTES = 1 << 20


class _Unread:
    """Stands where a value was refused, if its problem was not raised."""

    def __repr__(self) -> str:
        return "a refused value"


UNREAD = _Unread()
_MAX_DEPTH = 64
_MAX_DIGITS = 1000  # Python reads, but does not write, hexadecimals of any length
_NULL, _BOOL, _INT, _FLOAT, _TEXT = (
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")
)
_INTEGER = r"[-+]?(?:0|[1-9][0-9_]*|0[xX][0-9a-fA-F]+)"
_OCTAL = re.compile(r"^[-+]?0(?:[0-9_]+|[oO][0-7]+)$")
_RESOLVERS = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(rf"^(?:{_INTEGER}|{_OCTAL.pattern[1:-1]})$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9]*|\.[0-9]+|\.(?:inf|nan))$"
        ),
        list("-+.0123456789"),
    ),
)


def read_yaml(data: bytes, source: str, problems: list[str] | None = None) -> Any:
    """Returns the one YAML document in `data` as dicts, lists, text, numbers, bools and None.

    Args:
        data: The file's bytes, UTF-8.
        source: What to call it in messages.
        problems: Takes what can be told and read over, such as a key that is given twice; `UNREAD` stands for
            values that were refused. None: that is raised.

    Raises:
        ConfigError: If it is not UTF-8, not well-formed, too large or deep, or uses a refused feature; all
            that can be found at once.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{source}: must be at most {MAX_BYTES} bytes, got {len(data)}. Name a configuration file."
        )
    try:
        node = _Reader(_decode(data, source)).get_single_node()
    except yaml.reader.ReaderError as error:
        line = data.decode("utf-8-sig").count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}: line {line}: must be text, got the character {chr(error.character)!r}. Remove it."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(error, source)) from None
    except RecursionError:
        raise ConfigError(f"{source}: must nest at most {_MAX_DEPTH} levels, got more. Flatten it.") from None
    found: list[str] = []
    value = _value(node, source, found, depth=0) if node is not None else None
    if problems is not None:
        problems += found
    elif found:
        raise ConfigError(found)
    return value


def write_yaml(value: Any) -> str:
    """Returns `value` (dicts, lists, text, numbers, bools, None) as YAML that `read_yaml` reads back
    equal."""
    text: str = yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Reader(yaml.SafeLoader):
    """Composes nodes with the resolvers of this module; refuses aliases while composing, before they can
    multiply."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as PyYAML declares it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not read; use `base:`", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    """Quotes exactly the text that `_Reader` would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as PyYAML declares it

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _tag, _pattern, _first in _RESOLVERS:
    _Reader.add_implicit_resolver(_tag, _pattern, _first)
    _Writer.add_implicit_resolver(_tag, _pattern, _first)


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}: line {line}: must be UTF-8, got byte 0x{data[error.start]:02x}. Save the file as "
            "UTF-8."
        ) from None


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{source}: line {mark.line + 1}, column {mark.column + 1}" if mark else source
    problem = error.problem or error.context or "not well-formed"
    if "'\\t'" in problem:
        return f"{where}: must be indented with spaces, got a tab. Replace the tab."
    if "single document" in (error.context or ""):
        return f"{where}: must hold one YAML document, got a second one. Remove the `---` and what follows."
    return f"{where}: must be well-formed YAML, got: {problem}. Correct the line."


def _value(node: yaml.Node, source: str, problems: list[str], *, depth: int) -> Any:
    where = f"{source}: line {node.start_mark.line + 1}"
    if depth > _MAX_DEPTH:
        problems.append(f"{where}: must nest at most {_MAX_DEPTH} levels, got more. Flatten it.")
        return UNREAD
    if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
        return _mapping(node, source, problems, depth=depth)
    if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
        return [_value(child, source, problems, depth=depth + 1) for child in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        return _scalar(node, where, problems)
    problems.append(f"{where}: must be a plain value, got the tag {node.tag!r}. Remove the tag.")
    return UNREAD


def _scalar(node: yaml.ScalarNode, where: str, problems: list[str]) -> Any:
    if node.tag == _INT and _OCTAL.match(node.value):
        problems.append(
            f"{where}: an integer must not start with 0, got {node.value}. Drop the zero, or quote it as "
            "text."
        )
        return UNREAD
    try:
        return _SCALARS[node.tag](node.value)
    except ValueError:
        kind = node.tag.rpartition(":")[2]
        problems.append(f"{where}: must be a readable {kind}, got {node.value[:40]!r}. Correct the value.")
        return UNREAD


def _mapping(node: yaml.MappingNode, source: str, problems: list[str], *, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TEXT:
            problems.append(f"{source}: line {line}: a key must be text, got {key!r}. Quote it.")
        elif key in values:
            problems.append(
                f"{source}: line {line}: {key}: must be given once, got it on line {lines[key]} too. Remove "
                "one of the two."
            )
        else:
            lines[key] = line
            values[key] = _value(value_node, source, problems, depth=depth + 1)
    return values


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(text)
    return int(text.replace("_", ""), 16 if "x" in text.lower() else 10)


_SCALARS: dict[str, Any] = {
    _NULL: lambda _: None,
    _BOOL: lambda text: text.lower() == "true",
    _INT: _integer,
    _FLOAT: lambda text: float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")),
    _TEXT: str,
}
