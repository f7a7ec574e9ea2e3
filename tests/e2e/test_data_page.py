"""docs/data.md, from a phone's folder to running jobs: its configurations and commands as they stand
there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aiprod_ds.cli import main
from aiprod_ds.testing.awkward import Coding, Pixels, write_film
from aiprod_ds.testing.dist import run_forked

_BLOCK = re.compile(
    r"(?:As `(?P<file>[a-z]+\.yaml)`[^\n]*\n\n)?```(?P<kind>yaml|bash|bash fails)\n(?P<text>.*?)```",
    re.DOTALL,
)
_H264 = {"codec": "libx264", "pixel_format": "yuv420p", "rate_hz": 30}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    command: str
    fails: bool
    code: int | None
    output: str


@pytest.fixture(scope="module")
def steps(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """What the page's commands have answered, in order."""
    folder = tmp_path_factory.mktemp("phone")
    _write_phone(folder / "DCIM")
    commands: list[tuple[str, bool]] = []
    for block in _BLOCK.finditer((repository_root / "docs" / "data.md").read_text()):
        if block["kind"] == "yaml":
            assert block["file"] is not None, "the page says how each file is called"
            (folder / block["file"]).write_text(block["text"])
        else:
            fails = block["kind"].endswith("fails")
            commands += [(command, fails) for command in block["text"].splitlines()]
    arguments = {"folder": str(folder), "commands": [command for command, _ in commands]}
    answers = run_forked(answer_commands, arguments=arguments, timeout_seconds=500)
    return [
        Step(command=command, fails=fails, code=code, output=output)
        for (command, fails), (code, output) in zip(commands, answers, strict=True)
    ]


def answer_commands(folder: str, commands: list[str]) -> list[tuple[int, str]]:
    """Returns exit codes and output of commands in a folder.

    One process for all of them: each of its own would take seconds to import.
    """
    os.chdir(folder)
    os.environ.pop("COLUMNS", None)  # xdist sets it
    os.environ["AIPROD_DS_CACHE_DIR"] = str(Path(folder) / "cache")
    answers = []
    for command in commands:
        told = io.StringIO()
        if command.startswith("aiprod-ds "):
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                code = main(command.split()[1:])
        else:
            code = subprocess.run(command, shell=True, check=False).returncode
        answers.append((code, told.getvalue()))
    return answers


def _write_phone(folder: Path) -> None:
    """Films upright and across, in SDR and HDR, one with a cut, one half downloaded, a photo, and what is no
    media."""
    upright, hdr = (
        (90, False, False),
        {"color_range": 1, "color_trc": 18, "color_primaries": 9, "colorspace": 9},
    )
    for index in range(7):
        coding = Coding(**_H264, turn=upright if index % 3 == 0 else (0, False, False))
        write_film(folder / f"IMG_100{index}.mov", _drifting(20 + index, index), coding)
    deep = Coding(
        **{**_H264, "codec": "libx265", "pixel_format": "yuv420p10le"},
        tags=hdr,
        options={"x265-params": "log-level=none"},
    )
    write_film(folder / "sunset.mp4", _drifting(24, 50), deep)
    write_film(folder / "two scenes.mp4", _drifting(20, 60) + _drifting(20, 61), Coding(**_H264))
    for film in sorted(folder.iterdir()):
        film.with_suffix(".txt").write_text(f"a drifting field of colors called {film.stem}")
    write_film(folder / "beach.mp4", _drifting(24, 70), Coding(**_H264))
    (folder / "broken.mp4").write_bytes((folder / "IMG_1001.mov").read_bytes()[:3000])
    (folder / "IMG_0001.heic").write_bytes(b"0")
    (folder / "._IMG_1001.mov").write_bytes(b"0" * 100)


def _drifting(frames: int, seed: int) -> list[Pixels]:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((128, 72), Image.Resampling.BICUBIC))
    return [np.ascontiguousarray(np.roll(picture, 3 * index, axis=1)) for index in range(frames)]


def test_every_command_of_the_page_does_what_it_says(steps: list[Step]) -> None:
    assert [step for step in steps if (step.code != 0) is not step.fails] == []
    assert len(steps) == 10


def _output(steps: list[Step], command: str) -> str:
    (found,) = [step.output for step in steps if step.command == command]
    return " ".join(found.split())


def test_what_is_wrong_and_what_becomes_of_it_is_told(steps: list[Step]) -> None:
    look = _output(steps, "aiprod-ds data DCIM")
    assert "10 of 11 files can be trained on, 1 cannot" in look
    for words in (
        "1 incomplete left out broken.mp4",
        "1 HDR tone-mapped to SDR sunset.mp4",
        "3 stored turned or mirrored turned upright",
    ):
        assert words in look
    assert "ignored: caption of a clip (9), hidden (1), of a kind that is not read, convert it (1)" in look
    check = _output(steps, "aiprod-ds check video.yaml --read-all")
    assert "1 file cut into 2 scenes: two scenes.mp4" in check
    assert "1 file tone-mapped from HDR (HLG): sunset.mp4" in check
    assert "3 files turned or mirrored upright" in check
    assert "video.yaml: good" in check


def test_landscape_and_upright_get_shapes_of_their_own(steps: list[Step]) -> None:
    plan = _output(steps, "aiprod-ds plan video.yaml")
    assert "48x80" in plan
    assert "80x48" in plan


def test_the_missing_caption_is_named_before_anything_is_encoded(steps: list[Step]) -> None:
    check = _output(steps, "aiprod-ds check encode.yaml")
    assert "without a caption: beach.mp4: it must have a caption" in check


def test_both_jobs_run(steps: list[Step]) -> None:
    for command in ("aiprod-ds train video.yaml", "aiprod-ds train diffusion.yaml"):
        assert "completed 6 of 6 updates" in _output(steps, command)
    encoded = _output(steps, "aiprod-ds encode encode.yaml")
    assert "Encoded into DCIM_latents" in encoded
