"""Commands whose disk takes nothing, at each of their writes in turn: one line, the documented code, no half
file, and all there once the command is started again.

Oracle: what the same command leaves on a disk that stays well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aiprod_ds.cli import main
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.engine import dist
from aiprod_ds.testing.disks.faults import ERRNOS, BadDisk

ENCODE = """
data: {{media: {folder}/clips.csv, output_dir: {folder}/out/latents, num_workers: 0,
       shards: {{output: {folder}/out/shards, shard_mb: 0.01}}}}
video: {{model: {{source: 'aiprod_ds.testing.tiny:TinyVideoVAE'}}, precision: fp32}}
shapes: [{{resolution: 16x16, duration: {{frames: 4}}}}]
"""
NAMES = ("survey", "report", "shard", "encode")
KINDS = ["full", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ERRNOS if kind != "full")]
CODES = {0, 1, 2}  # what may be missing is a cache; failed; refused before anything was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command and where it writes.

    Attributes:
        arguments: Given a folder of its own, those of the command line.
        empties: Whether what was written must be deleted before it is started again, as it says itself.
    """

    arguments: Callable[[Path], list[str]]
    empties: bool = False


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    yield
    dist.shutdown()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    clips = write_synthetic_clips(folder, num_clips=2, frames=12, height=32, width=48)
    (folder / "clips.csv").write_text("video\n" + "".join(f"{clip.name}\n" for clip in clips))
    return folder


def _commands(media: Path) -> dict[str, Command]:
    def encode(folder: Path) -> list[str]:
        shutil.copytree(media, folder, dirs_exist_ok=True)
        (folder / "encode.yaml").write_text(ENCODE.format(folder=folder))
        return ["encode", str(folder / "encode.yaml")]

    def report(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        (folder / "run" / "metrics.jsonl").write_text('{"update": 1, "loss/total": 0.5}\n')
        return ["report", str(folder / "run"), "--output", str(folder / "out" / "page.html")]

    return {
        "survey": Command(
            arguments=lambda folder: [
                *("data", str(media), "--output", str(folder / "out")),
                *("--json", str(folder / "out" / "survey.json")),
            ]
        ),
        "report": Command(arguments=report),
        "shard": Command(arguments=lambda folder: ["shard", str(media), str(folder / "out")], empties=True),
        "encode": Command(arguments=encode, empties=True),
    }


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [5, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["every fifth write", "every write"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_write_that_fails_costs_one_line(
    tmp_path: Path, media: Path, capfd: pytest.CaptureFixture[str], name: str, kind: str, step: int
) -> None:
    command = _commands(media)[name]
    whole = tmp_path / "whole"
    (whole / "out").mkdir(parents=True)
    well = BadDisk(whole / "out")
    arguments = command.arguments(whole)
    with well.watched():
        assert main(arguments) == 0
    expected = _names(whole / "out")
    assert expected
    num_failed = 0
    for at in range(0, len(well.seen), step):
        folder = tmp_path / str(at)
        (folder / "out").mkdir(parents=True)
        arguments = command.arguments(folder)
        capfd.readouterr()
        with BadDisk(folder / "out", kind=kind, at=at, count=len(well.seen)).watched():
            code = main(arguments)
        told = capfd.readouterr().err
        where = f"{name}, {kind} at {at}: {well.seen[at]}, code {code}: {told}"
        assert "Traceback" not in told, where
        assert code in CODES, where
        assert (code == 0) == ("error:" not in told), where
        num_failed += code != 0
        halves = [one for one in _names(folder / "out") if one.endswith((".tmp", ".part", ".pending"))]
        if kind == "full":  # on other disks nothing can be deleted either
            assert halves == [], where
        if command.empties:
            shutil.rmtree(folder / "out")
        assert main(arguments) == 0, where
        assert _names(folder / "out") == expected, where
    assert num_failed > 0
