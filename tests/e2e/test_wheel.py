"""The wheel alone, in an empty folder and from another working folder: every command of the first hour, and
the validation, which trains, kills and resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import hatchling.build
import pytest

# Processes that import torch take minutes each where many others share the machine.
_SECONDS = 1200
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3 * _SECONDS)]

_TINY = (
    "curriculum.phases=[{name: only, resolution: 32x32, duration: {frames: 9}, global_batch_size: 2, "
    "updates: 2, learning_rate: 1.0e-3}]"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository_root: Path) -> Path:
    """The wheel as it is built of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(repository_root)
    try:
        return folder / hatchling.build.build_wheel(str(folder))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install --no-deps --target` makes of it, read-only as an installation may be."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    for path in (folder / "aiprod_ds" / "shipped").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def _run(
    installed: Path, folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "aiprod_ds")
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    command = [sys.executable, *program, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
    )


# One process for several commands: each of its own would take seconds to import.
_DRIVER = """
import contextlib, io, json, sys
from aiprod_ds.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code or 0
    answers.append((code, told.getvalue()))
print(json.dumps(answers))
"""


def _answers(installed: Path, folder: Path, *commands: Sequence[str]) -> list[tuple[int, str]]:
    """Returns exit codes and output of commands of the wheel."""
    done = _run(installed, folder, _DRIVER, json.dumps(commands), program=("-c",))
    assert done.returncode == 0, done.stderr[-3000:]
    return [(code, told) for code, told in json.loads(done.stdout.splitlines()[-1])]


def test_the_wheel_holds_what_is_shipped_and_no_more(wheel: Path, repository_root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {
        name.removeprefix("aiprod_ds/shipped/") for name in names if name.startswith("aiprod_ds/shipped/")
    }
    for part in ("configs", "ds_configs", "launch", "samples"):
        files = {
            str(path.relative_to(repository_root))
            for path in (repository_root / part).rglob("*")
            if path.is_file()
        }
        assert files
        assert {name for name in packed if name.startswith(f"{part}/")} == files
    assert "aiprod_ds/py.typed" in names
    others = {name.split("/")[0] for name in names} - {"aiprod_ds"}
    assert [name for name in others if not re.fullmatch(r"aiprod_ds-[\d.]+\.dist-info", name)] == []


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import aiprod_ds; import aiprod_ds.shipped.lookup as l; print(aiprod_ds.__file__, l.shipped())"
    found = _run(installed, tmp_path, code, program=("-c",))
    place = installed / "aiprod_ds"
    assert found.stdout.split() == [str(place / "__init__.py"), str(place / "shipped")], found.stderr


_SAID = {
    "--version": r"aiprod-ds \d+\.\d+",
    "examples": "video_vae/tiny",
    "check configs/audio_vae/tiny.yaml": "configs/audio_vae/tiny.yaml: good",
    "plan video_vae/tiny": r"in all +390 updates",
    "launch video_vae/tiny --dry-run": r"bash .*/shipped/launch/train_local\.sh video_vae/tiny",
}


def test_commands_need_no_checkout(installed: Path, tmp_path: Path) -> None:
    answers = _answers(installed, tmp_path, *map(str.split, _SAID))
    for (command, says), (code, told) in zip(_SAID.items(), answers, strict=True):
        assert code == 0, f"{command}: {told}"
        assert re.search(says, told), f"{command}: {told}"
    assert list(tmp_path.iterdir()) == []


def test_the_first_hour(installed: Path, tmp_path: Path) -> None:
    """Trains an example by name, copies another, and writes a configuration for the shipped clips."""
    train = ["train", "video_vae/tiny", "--set", _TINY, "--set", "evaluation.max_clips=1"]
    copy = ["examples", "samples", "audio_vae/tiny", "--to", "mine"]
    trained, copied = _answers(installed, tmp_path, train, copy)
    assert trained[0] == 0, trained[1][-3000:]
    report = json.loads((tmp_path / "runs" / "video_vae_tiny" / "report.json").read_text())
    assert report["status"] == "completed"
    assert copied[0] == 0, copied[1]
    (tmp_path / "mine" / "configs" / "audio_vae" / "tiny.yaml").write_text("base: audio_vae/tiny\nseed: 3\n")
    begun = _run(
        installed, tmp_path, "init", "own.yaml", "--train", "video_vae", "--data", "mine/samples",
        "--machine", "cpu",
    )  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    assert "own.yaml: good\nNext:\n  aiprod-ds launch own.yaml\n" in begun.stdout


def test_validate_trains_kills_and_resumes(installed: Path, tmp_path: Path) -> None:
    done = _run(installed, tmp_path, "validate", "--json")
    found = json.loads(done.stdout)
    failed = [f"{check['name']}: {check['detail']}" for check in found["checks"] if not check["passed"]]
    assert failed == []
    assert (done.returncode, found["passed"], len(found["checks"])) == (0, True, 13)
    trainings = [check for check in found["checks"] if check["name"].startswith("train_")]
    assert len(trainings) == 3
    for check in trainings:
        assert check["detail"].startswith("cpu, zero1_fp32: killed, went on from update_")
        assert 0 < check["seconds"] < 600
    assert list(tmp_path.iterdir()) == []


def test_an_installation_that_computes_otherwise_fails(installed: Path, tmp_path: Path) -> None:
    """The same command with a loss that is wrong, and trainings that cannot begin."""
    code = (
        "import sys, aiprod_ds.losses.spectral as spectral, aiprod_ds.validate.training as training\n"
        "spectral._POWER_EPSILON = 1e-6\n"
        "training.sys = type('', (), {'executable': '/bin/false'})\n"
        "from aiprod_ds.cli import main\n"
        "sys.exit(main(['validate']))"
    )
    done = _run(installed, tmp_path, code, program=("-c",))
    assert done.returncode == 1, done.stderr
    assert re.search(r"✗ +spectral STFT loss", done.stdout)
    assert "a click: must be 1.644" in done.stdout
    assert "training: must run, got exit code 1" in done.stdout
    assert "5 of 13 checks failed" in done.stdout
