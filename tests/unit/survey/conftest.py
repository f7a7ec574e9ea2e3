"""A folder as people have it, surveyed once by the command itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiprod_ds.cli import main
from aiprod_ds.testing.awkward import write_sound
from aiprod_ds.testing.awkward_folder import Truth, write_awkward_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A folder, what is true of it, and what the command wrote."""

    folder: Path
    truth: Truth
    output: Path
    document: dict[str, Any]

    def file(self, path: str) -> dict[str, Any]:
        """Returns what the document says of a file."""
        (found,) = (file for file in self.document["files"] if file["path"] == path)
        return dict(found)

    def kinds(self, path: str) -> list[str]:
        """Returns what was found of a file."""
        return [found["kind"] for found in self.file(path)["findings"]]


@pytest.fixture(scope="package")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Surveyed:
    root = tmp_path_factory.mktemp("survey")
    folder = root / "clips"
    truth = write_awkward_folder(folder)
    seconds = np.arange(24_000) / 48_000
    tone = (0.4 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    write_sound(folder / "song.flac", np.stack([tone, tone]), codec="flac", layout="stereo")
    write_sound(folder / "surround.wav", np.stack([tone] * 6), codec="pcm_s16le", layout="5.1")
    write_sound(folder / "silence.wav", np.zeros((1, 8_000), np.float32), codec="pcm_s16le", layout="mono")
    loud = np.clip(8 * tone, -1, 1)[None]
    write_sound(folder / "loud.wav", loud, codec="pcm_s16le", layout="mono")
    (folder / "zz copy.mp4").write_bytes((folder / "plain.mp4").read_bytes())
    (folder / "plain.txt").write_text("four quarters, each of one color")
    (folder / "film.part").write_bytes(b"0" * 9)
    (folder / "clip.mkv.crdownload").write_bytes(b"0" * 9)
    (folder / "nothing.bin").touch()
    document = root / "survey.json"
    assert main(["data", str(folder), "--output", str(root / "page"), "--json", str(document)]) == 0
    return Surveyed(
        folder=folder, truth=truth, output=root / "page", document=json.loads(document.read_text())
    )


@pytest.fixture(autouse=True)
def _lines_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist sets it
