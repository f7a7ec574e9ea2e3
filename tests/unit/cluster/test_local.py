"""`aiprod-ds launch` without a hostfile: the command for this machine, and what has no meaning there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from aiprod_ds.cli import main

_ROOT = Path(__file__).resolve().parents[3]


def _dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["launch", *arguments, "--dry-run"]) == 0
    return shlex.split(capsys.readouterr().out)


def test_a_trainer_gets_the_script_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = _dry(capsys, "video_vae/tiny", "runs/a", "--set", "seed=3", "--resume", "never", "--verbose")
    script = str(_ROOT / "launch" / "train_local.sh")
    options = ["--set", "seed=3", "--verbose", "--resume", "never"]
    assert found == ["bash", script, "video_vae/tiny", "runs/a", *options]
    folder = _dry(capsys, "video_vae/tiny")[3]
    assert folder == "runs/video_vae_tiny"


def test_encode_gets_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    script = str(_ROOT / "launch" / "encode_local.sh")
    found = _dry(capsys, "encode/tiny", "latents")
    assert found == ["bash", script, "encode/tiny", "--output-dir", "latents"]
    assert _dry(capsys, "encode/tiny") == ["bash", script, "encode/tiny"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample/tiny"], "must be a configuration of train or encode, got one of sample"),
        (["video_vae/tiny", "--set", "sed=1"], "Did you mean 'seed'?"),
        (["video_vae/tiny", "--no-ssh", "--node-rank", "1"], "--no-ssh: has no effect without --hostfile"),
        (
            ["video_vae/tiny", "--max-restarts", "2"],
            "--max-restarts: has no effect without --hostfile, got 2.",
        ),
        (["video_vae/tiny", "--hostfile", "hosts"], "RUN_FOLDER: must be given with --hostfile, got none."),
    ],
)
def test_bad_input_is_explained(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err
