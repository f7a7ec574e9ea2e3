"""The wheel alone, in an empty folder and from another working folder: every command of the first hour, and
the validation, which trains, kills and resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], r"aiprod-ds \d+\.\d+"),
        (["examples"], "video_vae/tiny"),
        (["check", "configs/audio_vae/tiny.yaml"], "configs/audio_vae/tiny.yaml: good"),
        (["plan", "video_vae/tiny"], r"in all +390 updates"),
        (["launch", "video_vae/tiny", "--dry-run"], r"bash .*/shipped/launch/train_local\.sh video_vae/tiny"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_need_no_checkout(installed: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = _run(installed, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_the_first_hour(installed: Path, tmp_path: Path) -> None:
    """Trains an example by name, copies another, and writes a configuration for the shipped clips."""
    trained = _run(
        installed, tmp_path, "train", "video_vae/tiny", "--set", _TINY, "--set", "evaluation.max_clips=1"
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    report = json.loads((tmp_path / "runs" / "video_vae_tiny" / "report.json").read_text())
    assert report["status"] == "completed"
    copied = _run(installed, tmp_path, "examples", "samples", "audio_vae/tiny", "--to", "mine")
    assert copied.returncode == 0, copied.stderr
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
