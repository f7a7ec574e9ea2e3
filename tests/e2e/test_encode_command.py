"""`aiprod-ds encode`, in a process of its own and on two ranks; in this process it explains bad input and
clips."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aiprod_ds.cli import main
from aiprod_ds.data.latents import default_folder
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.strict_yaml import write_yaml
from aiprod_ds.testing.processes import run_in_own_session

DONE, FAILED, BAD_CONFIGURATION = 0, 1, 2
ENTRIES = 2 + 2 + 1  # captions, latents, the empty caption

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with captions, and a configuration."""
    root = tmp_path_factory.mktemp("encode")
    write_synthetic_clips(root / "clips", num_clips=2, frames=8, height=32, width=48)
    (root / "clips.csv").write_text("video,caption\nclips/clip_00000.mp4,one\nclips/clip_00001.mp4,two\n")
    attention = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 259}
    values = {
        "data": {"media": "clips.csv", "num_workers": 1},
        "video": {"model": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"}, "precision": "fp32"},
        "text": {"source": "T5EncoderModel", "config": attention, "precision": "fp32", "max_tokens": 16},
        "shapes": [{"resolution": "16x16", "duration": {"frames": 3}}],
    }
    (root / "encode.yaml").write_text(write_yaml(values))
    return root


Encode = Callable[..., tuple[int, str]]


@pytest.fixture
def encode(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Encode:
    """Runs the command with options in this process: to start one takes most of its seconds."""

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["encode", "encode.yaml", *options])
        return code, "".join(capsys.readouterr())

    monkeypatch.chdir(folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return run


def _encode_in_a_process(
    folder: Path, *options: str, program: tuple[str, ...] = (sys.executable, "-m", "aiprod_ds", "encode")
) -> tuple[int | None, str]:
    binaries = Path(sys.executable).parent
    path = os.pathsep.join([str(binaries), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "VENV": str(binaries.parent),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = ["env", "--chdir", str(folder), *program, "encode.yaml", *options]
    return run_in_own_session(command, timeout_seconds=600, environment=environment)


def _entries(output: Path) -> list[Path]:
    return sorted(path.relative_to(output) for path in output.rglob("*.safetensors"))


def test_it_encodes_and_then_finds_everything_present(folder: Path, encode: Encode) -> None:
    code, output = _encode_in_a_process(folder)
    assert code == DONE, output
    assert "Traceback" not in output
    lines = output.splitlines()
    assert any(line.startswith(f"Encoded into {default_folder(folder)} in ") for line in lines)
    assert "  conditions           2        0" in lines
    assert "  latents              2        0" in lines
    before = {
        path: (default_folder(folder) / path).stat().st_mtime_ns for path in _entries(default_folder(folder))
    }
    assert len(before) == ENTRIES

    code, output = encode()
    assert code == DONE, output
    assert "  conditions           0        2" in output.splitlines()
    assert "  latents              0        2" in output.splitlines()
    assert {path: (default_folder(folder) / path).stat().st_mtime_ns for path in before} == before


def test_every_problem_of_a_configuration_is_told_and_nothing_written(folder: Path, encode: Encode) -> None:
    code, output = encode(
        "--set",
        "data.mdia=x",
        "--set",
        "text.max_tokens=0",
        "--set",
        "shapes[3].resolution=8x8",
        "--output-dir",
        "bad",
    )
    assert code == BAD_CONFIGURATION
    problems = [line for line in output.splitlines() if line.startswith("error: ")]
    for message in (
        "data.mdia: is not a known key",
        "text.max_tokens: must be >= 1, got 0",
        "shapes must have entry [3], got 1",
    ):
        assert any(message in problem for problem in problems), output
    assert len(problems) == 3
    assert not (folder / "bad").exists()


def test_media_that_are_not_there_are_a_bad_configuration(folder: Path, encode: Encode) -> None:
    code, output = encode("--set", "data.media=gone.csv", "--output-dir", "bad")
    assert code == BAD_CONFIGURATION
    assert (
        "error: encode.yaml: data.media: gone.csv: must be a folder or a CSV, JSON or JSONL manifest"
        in output
    )
    assert not (folder / "bad").exists()


def test_a_damaged_clip_fails_by_name_and_the_others_are_encoded(folder: Path, encode: Encode) -> None:
    (long,) = write_synthetic_clips(folder / "long", num_clips=1, frames=48, height=32, width=48)
    content = bytearray(long.read_bytes())
    start, stop = (
        int(0.4 * len(content)),
        int(0.6 * len(content)),
    )  # frames in the middle, which are what is encoded
    content[start:stop] = bytes(stop - start)
    (folder / "clips" / "damaged.mp4").write_bytes(content)
    (folder / "damaged.csv").write_text("video,caption\nclips/clip_00000.mp4,one\nclips/damaged.mp4,two\n")
    media = ["--set", "data.media=damaged.csv", "--output-dir", "damaged"]
    code, output = encode(*media)
    assert code == FAILED
    assert "error: damaged.csv: at most 5% of the clips may fail, got 1 of 2: clips/damaged.mp4 (" in output
    assert "Traceback" not in output

    code, output = encode(*media, "--set", "data.max_failed_fraction=0.5")
    assert code == DONE, output
    assert "Failed: 1" in output.splitlines()
    assert "All of them: damaged/failures_damaged.json" in output.splitlines()
    assert [path for path in _entries(folder / "damaged") if path.parts[0] == "latents"] == [
        Path("latents/clips/clip_00000.mp4@3x16x16.safetensors")
    ]


def test_the_script_encodes_on_two_ranks(folder: Path, repository_root: Path) -> None:
    program = (str(repository_root / "launch" / "encode_local.sh"),)
    code, output = _encode_in_a_process(folder, "--output-dir", "two", program=program)
    assert code == DONE, output
    assert len(_entries(folder / "two")) == ENTRIES
    assert output.count("Encoded into two in ") == 1, "one rank tells"
    code, output = _encode_in_a_process(folder, "--set", "seed=x", "--output-dir", "two", program=program)
    assert code == BAD_CONFIGURATION, output
