"""Hostfiles and host filters: what is taken, and every problem of what is not, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiprod_ds.cluster.hostfile import Host, num_ranks, parse_hostfile, read_hostfile, select_hosts
from aiprod_ds.errors import ConfigError

HOSTS = (Host(name="node-a", slots=(0, 1, 2, 3)), Host(name="10.0.0.2", slots=(0, 1)))


def _problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "F")
    return caught.value.problems


def test_blank_lines_and_comments_do_not_matter() -> None:
    hosts = parse_hostfile("# two hosts\n\n  node-a slots=4\n10.0.0.2\tslots=2   # the small one\n", "F")
    assert hosts == HOSTS
    assert num_ranks(hosts) == 6


def test_the_example_is_good(repository_root: Path) -> None:
    assert [host.name for host in read_hostfile(repository_root / "launch" / "hostfile.example")] == [
        "node-a",
        "node-b",
    ]


BAD_LINES = {
    "h;touch x slots=1": "F:1: must begin with a host name of letters, digits, '.', '-' and '_', got "
    "'h;touch'.",
    "$(reboot) slots=1": "got '$(reboot)'",
    "`id` slots=1": "got '`id`'",
    "-oProxyCommand=x slots=1": "got '-oProxyCommand=x'",
    "me@node slots=1": "users, ports and keys belong into ~/.ssh/config",
    "node[1-4] slots=1": "got 'node[1-4]'",
    "node:22 slots=1": "got 'node:22'",
    "node": "F:1: must have the form `node slots=N`, got 'node'.",
    "node slots = 2": "must have the form `node slots=N`, got 'node slots = 2'.",
    "node slots=two": "must have the form",
    "node slots=2 gpus=2": "must have the form",
    "node slots=0": "slots must be between 1 and 1024, got 0.",
    "node slots=9999": "slots must be between 1 and 1024, got 9999.",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=list(BAD_LINES))
def test_a_bad_line_is_told_with_its_number(line: str, message: str) -> None:
    (problem,) = _problems(line)
    assert problem.startswith("F:1: ")
    assert message in problem


def test_every_bad_line_is_told_at_once() -> None:
    problems = _problems("a slots=1\nb;c slots=1\n\na slots=2\nd slots=0\n")
    assert [problem.split(":")[1] for problem in problems] == ["2", "4", "5"]
    assert "must name every host once, got 'a' again (first in line 1)" in problems[1]


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_a_hostfile_names_a_host(text: str) -> None:
    assert _problems(text) == (
        "F: must name at least one host, got none. Write lines such as `node-a slots=8`.",
    )


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"hosts: must be a readable text file, got .* Begin with a copy of launch/hostfile.example",
    ):
        read_hostfile(tmp_path / "hosts")


FILTERS = {
    "nothing": ({}, (6, ["node-a", "10.0.0.2"])),
    "include a host": ({"include": "10.0.0.2"}, (2, ["10.0.0.2"])),
    "include slots": ({"include": "10.0.0.2@node-a:1,3"}, (4, ["node-a", "10.0.0.2"])),
    "exclude a host": ({"exclude": "node-a"}, (2, ["10.0.0.2"])),
    "exclude slots": ({"exclude": "node-a:0@10.0.0.2:0,1"}, (3, ["node-a"])),
}


@pytest.mark.parametrize(("filters", "expected"), FILTERS.values(), ids=list(FILTERS))
def test_filters_choose_in_the_order_of_the_file(
    filters: dict[str, str], expected: tuple[int, list[str]]
) -> None:
    chosen = select_hosts(HOSTS, **filters)
    assert (num_ranks(chosen), [host.name for host in chosen]) == expected


BAD_FILTERS = {
    "both": ({"include": "node-a", "exclude": "node-a"}, "at most one of them may be given, got both"),
    "unknown": (
        {"include": "node-b"},
        "--include: must name hosts of the hostfile, got 'node-b'. Did you mean 'node-a'?",
    ),
    "metacharacters": (
        {"exclude": "node-a;id"},
        "--exclude: must name hosts of the hostfile, got 'node-a;id'.",
    ),
    "unknown slot": ({"include": "node-a:4"}, "--include: slots of node-a must be of 0 to 3, got '4'."),
    "no number": ({"include": "node-a:x"}, "--include: slots of node-a must be of 0 to 3, got 'x'."),
    "empty slots": ({"include": "node-a:"}, "got ''."),
    "twice": (
        {"include": "node-a:0@node-a:1"},
        "must name every host once, got 'node-a' again. Join its slots by commas.",
    ),
    "nothing left": (
        {"exclude": "node-a@10.0.0.2"},
        "must leave at least one slot, got 'node-a@10.0.0.2', which leaves none.",
    ),
}


@pytest.mark.parametrize(("filters", "message"), BAD_FILTERS.values(), ids=list(BAD_FILTERS))
def test_a_bad_filter_is_told(filters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_hosts(HOSTS, **filters)
    assert message in str(caught.value)
