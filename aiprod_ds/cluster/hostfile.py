"""Hostfiles and the choice of hosts and slots: `name slots=N` a line, `--include` and `--exclude` as
DeepSpeed has them.

Stricter than DeepSpeed's own parser, because the names end up on command lines: what could mean anything to a
shell, to ssh or to pdsh is refused, and every problem is told at once. Starts nothing. Called by the launcher
and the doctor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.config.messages import suggestion
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import read_text

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LINE = re.compile(r"(?P<name>\S+)(?:\s+(?P<rest>.*))?")
_SLOTS = re.compile(r"slots=(\d{1,4})")
_MAX_SLOTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host of a run.

    Attributes:
        name: As ssh and the other hosts know it.
        slots: The GPUs (or CPU processes) to use on it, by index; one rank each.
    """

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Returns the hosts of a hostfile, in its order, with all their slots.

    Raises:
        ConfigError: With every bad line, or if the file cannot be read or names no host.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: must be a readable text file, got {error}. Begin with a copy of "
            "launch/hostfile.example."
        ) from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, where: str) -> tuple[Host, ...]:
    """Returns the hosts of a hostfile's text; `where` names it in messages.

    Raises:
        ConfigError: With every bad line, or if there is no host.
    """
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.split("#", 1)[0].strip()
        if not entry:
            continue
        found = _LINE.fullmatch(entry)
        name, rest = (found["name"], found["rest"] or "") if found is not None else (entry, "")
        problem = _problem(name, rest)
        if problem is None and name in hosts:
            problem = (
                f"must name every host once, got {name!r} again (first in line {lines[name]}). Remove one "
                "of the two."
            )
        if problem is not None:
            problems.append(f"{where}:{number}: {problem}")
            continue
        hosts[name], lines[name] = (
            Host(name=name, slots=tuple(range(int(rest.removeprefix("slots="))))),
            number,
        )
    if not hosts and not problems:
        problems.append(
            f"{where}: must name at least one host, got none. Write lines such as `node-a slots=8`."
        )
    if problems:
        raise ConfigError(problems)
    return tuple(hosts.values())


def select_hosts(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """Returns the chosen hosts and slots, in the order of the hostfile.

    Args:
        hosts: Those of the hostfile, which need not be reachable.
        include: `name`, or `name:slot,slot`, joined by `@`: only these. Empty: all.
        exclude: In the same form, all but these. Empty: none.

    Raises:
        ConfigError: With every unknown host or slot; if both are given, or nothing is left.
    """
    if include and exclude:
        raise ConfigError("--include, --exclude: at most one of them may be given, got both. Remove one.")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return tuple(hosts)
    named, problems = _parse_filter(option, text, {host.name: host for host in hosts})
    if problems:
        raise ConfigError(problems)
    chosen = tuple(_chosen(hosts, named, is_included=bool(include)))
    if not chosen:
        raise ConfigError(
            f"{option}: must leave at least one slot, got {text!r}, which leaves none. Name fewer hosts."
        )
    return chosen


def num_ranks(hosts: Sequence[Host]) -> int:
    """Returns the number of ranks on all hosts."""
    return sum(len(host.slots) for host in hosts)


def _problem(name: str, rest: str) -> str | None:
    """Returns what is wrong with an entry; None if it is good."""
    if _NAME.fullmatch(name) is None:
        return (
            f"must begin with a host name of letters, digits, '.', '-' and '_', got {name!r}. "
            "Write it as `ssh NAME` takes it; users, ports and keys belong into ~/.ssh/config."
        )
    slots = _SLOTS.fullmatch(rest)
    if slots is None:
        return (
            f"must have the form `{name} slots=N`, got {f'{name} {rest}'.strip()!r}. N is the number of "
            "GPUs to use there."
        )
    if not 1 <= int(slots[1]) <= _MAX_SLOTS:
        return (
            f"slots must be between 1 and {_MAX_SLOTS}, got {slots[1]}. Comment out hosts that are not to "
            "be used."
        )
    return None


def _parse_filter(
    option: str, text: str, hosts: Mapping[str, Host]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    named: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for part in text.split("@"):
        name, colon, listed = part.partition(":")
        if name not in hosts:
            problems.append(
                f"{option}: must name hosts of the hostfile, got {name!r}. {suggestion(name, hosts)}"
            )
            continue
        if name in named:
            problems.append(
                f"{option}: must name every host once, got {name!r} again. Join its slots by commas."
            )
            continue
        known = hosts[name].slots
        slots = (
            tuple(int(slot) if re.fullmatch(r"\d{1,4}", slot) else -1 for slot in listed.split(","))
            if colon
            else known
        )
        if not set(slots) <= set(known):
            problems.append(
                f"{option}: slots of {name} must be of 0 to {known[-1]}, got {listed!r}. Write e.g. "
                f"{name}:0,1."
            )
        named[name] = slots
    return named, problems


def _chosen(
    hosts: Sequence[Host], named: Mapping[str, tuple[int, ...]], *, is_included: bool
) -> Iterator[Host]:
    for host in hosts:
        listed = named.get(host.name, ())
        slots = tuple(slot for slot in host.slots if (slot in listed) == is_included)
        if slots:
            yield Host(name=host.name, slots=slots)
