"""The command that stands under "How to do it again": the one that starts all ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiprod_ds.cluster.environment import parse_environment
from aiprod_ds.report.command import (
    VARIABLE,
    encoded,
    launcher_command,
    ranks_of,
    starting_command,
    typed_command,
)

RANK = ["/x/aiprod_ds/__main__.py", "--local_rank=1", "train", "a.yaml"]
_SHOW = (
    "import sys; sys.argv = sys.argv[1:]; "
    "from aiprod_ds.report.command import starting_command; print(starting_command())"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            [
                "/v/bin/python3",
                "/v/bin/deepspeed",
                "--num_gpus",
                "8",
                "--module",
                "aiprod_ds",
                "train",
                "a b.yaml",
            ],
            "deepspeed --num_gpus 8 --module aiprod_ds train 'a b.yaml'",
        ),
        (["/v/bin/torchrun", "--nproc-per-node", "2", "-m", "x"], "torchrun --nproc-per-node 2 -m x"),
        (["/v/bin/python", "-m", "torch.distributed.run", "x"], "python -m torch.distributed.run x"),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="], ""),  # of one host
        (["bash", "deepspeed.sh"], ""),
        ([], ""),
    ],
)
def test_launchers_are_known_by_their_command(line: list[str], expected: str) -> None:
    assert launcher_command(line) == expected


def test_what_a_launcher_added_is_left_out() -> None:
    program = f"{Path(sys.executable).name} -m aiprod_ds"
    assert typed_command(RANK) == f"{program} train a.yaml"
    assert typed_command([RANK[0], "--local_rank", "train"]) == f"{program} train"


def test_what_was_typed_passes_through_a_file_of_variables() -> None:
    typed = """aiprod-ds launch 'a "b".yaml' run --set 'x=$HOME%h\\`'"""
    value = encoded(typed)
    assert parse_environment(f"{VARIABLE}={value}", "env") == {VARIABLE: value}
    assert starting_command({VARIABLE: value, "RANK": "0"}) == typed


def test_ranks_and_hosts_are_what_launchers_say() -> None:
    assert ranks_of({}) == {"ranks": 1, "hosts": 1}
    assert ranks_of({"WORLD_SIZE": "16", "LOCAL_SIZE": "8", "CROSS_SIZE": "2"}) == {"ranks": 16, "hosts": 2}
    assert ranks_of({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == {"ranks": 16, "hosts": 2}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_finds_the_launcher_that_it_descends_from(tmp_path: Path) -> None:
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_SHOW!r}, *{RANK!r}], check=True)\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(launcher), "--nproc-per-node", "2", "a.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    for extra, expected in (
        ({"RANK": "1"}, "torchrun --nproc-per-node 2 a.yaml"),
        ({}, f"{Path(sys.executable).name} -m aiprod_ds train a.yaml"),
    ):
        environment.pop("RANK", None)
        done = subprocess.run(
            command, env={**environment, **extra}, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == expected
