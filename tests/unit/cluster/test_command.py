"""The deepspeed command: its options, and that arguments come out of real shells as they went in."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aiprod_ds.cluster.command import Launch, check_paths, deepspeed_command, quote_for_pdsh, rank_pattern
from aiprod_ds.errors import ConfigError

LAUNCH = Launch(
    hostfile=Path("hosts"),
    config=Path("c.yaml"),
    run_folder=Path("/runs/x"),
    master_address="10.0.0.1",
    master_port=1234,
)
HOSTILE = [
    "plain",
    "curriculum.phases[0].updates=5",
    "name=two words",
    "name=$(touch made)",
    "name=a $(touch made) `touch made`",
    "a;touch made",
    "x > made",
    'say "hi" to $HOME',
    "it's",
    "it's a 'b'",
    "back\\slash",
    "back \\ slash \\$x",
    "%n %h 100%",
    "%n",
    "~/x",
    "*",
    "{a: [1, 2]}",
    "!! !x",
    "",
]


def _as_deepspeed_has_it(argument: str) -> str:
    """What deepspeed 0.19.8 does with an argument (launcher/multinode_runner.py:73); tests/upstream compares
    it."""
    return '"{}"'.format(argument.replace('"', '\\"')) if " " in argument else argument


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_arguments_reach_the_ranks_as_they_are(shell: str, tmp_path: Path) -> None:
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    parts = [
        shlex.join([sys.executable, "-c", show]),
        *(_as_deepspeed_has_it(quote_for_pdsh(one)) for one in HOSTILE),
    ]
    remote = " ".join(parts).replace("%%", "%")  # pdsh joins by spaces and turns %% into %
    done = subprocess.run([shell, "-c", remote], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == HOSTILE
    assert list(tmp_path.iterdir()) == [], "nothing was executed"


def test_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigError, match="arguments: must be text on one line, got"):
        deepspeed_command(replace(LAUNCH, options=("--set", "a=b\ntouch made")))


def test_all_hosts_are_started_by_pdsh() -> None:
    command = deepspeed_command(replace(LAUNCH, include="a@b:0", options=("--set", "x=$y")))
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = command[3 : command.index("--module")]
    assert options[:4] == ["--hostfile", "hosts", "--include", "a@b:0"]
    assert {"--force_multi", "--no_ssh_check", "--no_local_rank"} <= set(options)
    assert command[command.index("--module") + 1 :][:4] == ["aiprod_ds", "train", "c.yaml", "--output-dir"]
    assert command[-1] == "'x=$y'"


def test_one_host_is_started_without_a_shell() -> None:
    command = deepspeed_command(replace(LAUNCH, node_rank=1, bind_cores=True, options=("--set", "x=$y z")))
    options = command[3 : command.index("--module")]
    assert options[2:5] == ["--no_ssh", "--node_rank", "1"]
    assert "--bind_cores_to_rank" in options
    assert command[-1] == "x=$y z", "no shell, no quotes"


def test_the_launcher_is_quiet_unless_all_is_asked_for() -> None:
    def level(command: list[str]) -> str:
        return command[command.index("--log_level") + 1]

    quiet, verbose = (deepspeed_command(replace(LAUNCH, is_verbose=asked)) for asked in (False, True))
    assert (level(quiet), level(verbose)) == ("warning", "info")
    assert "--verbose" not in quiet
    assert verbose[-1] == "--verbose"


def test_the_pattern_finds_ranks_of_this_run_only() -> None:
    pattern = re.compile(rank_pattern(replace(LAUNCH, run_folder=Path("/runs/x+(1)"))))
    rank = "/venv/bin/python -u -m aiprod_ds train c.yaml --output-dir /runs/x+(1)"
    assert pattern.search(rank)
    assert pattern.search(f"{rank} --resume auto")
    launcher = rank.replace("-u -m", "-u -m deepspeed.launcher.launch --node_rank=0 --module")
    assert [
        other
        for other in (f"{rank}2", launcher, rank.replace("(1)", "(2)"), pattern.pattern)
        if pattern.search(other)
    ] == []


def test_a_working_folder_with_blanks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_paths()
    (tmp_path / "my code;x").mkdir()
    monkeypatch.chdir(tmp_path / "my code;x")
    with pytest.raises(ConfigError, match=r"working folder: must be of letters, digits .* got '.*my code;x'"):
        check_paths()
