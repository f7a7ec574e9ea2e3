"""The same content twice in training, or in training and validation, is found by content in every kind of
data and however it is named, and told with the names of both files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from aiprod_ds.config.data import AudioDataConfig, ClipDataConfig, LatentDataConfig, VideoDataConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import CONDITIONS, LATENTS, LatentShape, entry_path, write_entry
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import DataError
from aiprod_ds.media.sounds import save_wav
from aiprod_ds.trainers.clip_data import manifest_notes, split_manifests
from aiprod_ds.trainers.open_data import open_audio_files, open_video_files

SHAPE = LatentShape(frames=5, height=64, width=64)
Kind = Literal["video", "audio", "latents", "foreign latents"]
KINDS: tuple[Kind, ...] = ("video", "audio", "latents", "foreign latents")
SUFFIX = {"video": ".mp4", "audio": ".wav", "latents": ".mp4", "foreign latents": ""}


class Folder:
    """Clips of one kind: `names` of contents, so that equal numbers are the same clip."""

    def __init__(self, root: Path, kind: Kind, contents: Sequence[tuple[str, int]]) -> None:
        self.root, self.kind = root, kind
        for name, number in contents:
            _WRITERS[kind](root, f"{name}{SUFFIX[kind]}", number)


def _video(root: Path, name: str, number: int) -> None:
    made = root.parent / f"made_{root.name}_{name}"
    write_synthetic_clips(made, num_clips=1, frames=5, height=16, width=16, seed=number, with_sound=False)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made / "clip_00000.mp4", root / name)


def _sound(root: Path, name: str, number: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(np.arange(44_100) * (0.05 + 0.01 * number))
    save_wav(torch.from_numpy(wave).float()[None], root / name, sample_rate_hz=44_100)


def _latents(root: Path, name: str, number: int) -> None:
    facts = {"media_sha256": f"sha of {number}", "fps": "24.0", "media_fps": "24.0"}
    facts |= {"media_frames": "5", "media_seconds": "0.2", "media_height": "64", "media_width": "64"}
    # Encoded on another machine: the same media need not be the same bits.
    latents = _drawn(number) + 1e-3 * len(name)
    write_entry(entry_path(root, LATENTS, f"{name}@{SHAPE.tag}"), {"latents": latents}, facts)
    _prompt(root, name, ".safetensors")


def _foreign(root: Path, name: str, number: int) -> None:
    """As ltx-trainer writes them: nothing says of which media they are."""
    path = root / LATENTS / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = root.parent / "made.pt"
    torch.save({"latents": _drawn(number), "fps": 24.0}, made)
    shutil.copyfile(made, path)
    _prompt(root, name, ".pt")


def _drawn(number: int) -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(number))


def _prompt(root: Path, name: str, suffix: str) -> None:
    prompt = {"prompt_embeds": torch.zeros(2, 3), "prompt_attention_mask": torch.ones(2)}
    path = root / CONDITIONS / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".pt":
        torch.save(prompt, path)
    else:
        write_entry(path, prompt, {})


_WRITERS: dict[Kind, Callable[[Path, str, int], None]] = {
    "video": _video,
    "audio": _sound,
    "latents": _latents,
    "foreign latents": _foreign,
}


def _notes(kind: Kind, train: Path, validation: Path | None, **settings: Any) -> tuple[str, ...]:
    config = {"train": str(train), "validation": None if validation is None else str(validation), **settings}
    if kind == "video":
        return open_video_files(VideoDataConfig(**config), seed=0).notes
    if kind == "audio":
        return open_audio_files(AudioDataConfig(**config, channels=1), seed=0).notes
    needs = LatentNeeds(strides=ModelStrides(spatial=4, temporal=2))
    data: ClipDataConfig = LatentDataConfig(**config)
    manifests = split_manifests(data, lambda source: scan_latents(source, needs), seed=0)
    return manifest_notes(data, *manifests)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def test_leaks_and_copies_are_told_with_both_names(tmp_path: Path, kind: Kind) -> None:
    train = Folder(tmp_path / "train", kind, [("a", 1), ("b", 2), ("copy_of_a", 1)])
    held_out = Folder(tmp_path / "held_out", kind, [("other_b", 2), ("c", 3)])
    end = SUFFIX[kind]
    leak = f"{held_out.root}/other_b{end} = {train.root}/b{end}"
    assert _notes(kind, train.root, held_out.root) == (
        f"1 clip held out and trained on at once, by content: {leak}",
        f"1 clip in training more than once, by content: a{end} = copy_of_a{end}",
    )
    assert _notes(kind, train.root, held_out.root, duplicates="allow") == ()
    with pytest.raises(DataError, match=rf"got 1 clip held out .*other_b{end} = .*/b{end}"):
        _notes(kind, train.root, held_out.root, duplicates="error")


def test_the_same_name_in_two_folders_is_no_leak(tmp_path: Path, kind: Kind) -> None:
    train = Folder(tmp_path / "train", kind, [("a", 1), ("b", 2)])
    held_out = Folder(tmp_path / "held_out", kind, [("a", 3)])
    assert _notes(kind, train.root, held_out.root, duplicates="error") == ()


def test_copies_are_held_out_together_or_not_at_all(tmp_path: Path) -> None:
    numbers = [("a", 1), ("b", 2), ("copy_of_a", 1), ("copy_of_b", 2)]
    train = Folder(tmp_path / "train", "video", numbers)
    (note,) = _notes("video", train.root, None)
    assert note in (
        "1 clip in training more than once, by content: a.mp4 = copy_of_a.mp4",
        "1 clip in training more than once, by content: b.mp4 = copy_of_b.mp4",
    )


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_tables_are_no_way_around_it(tmp_path: Path, suffix: str) -> None:
    """Rows name files in other folders, one of them twice by two names."""
    Folder(tmp_path / "first", "video", [("a", 1), ("b", 2)])
    Folder(tmp_path / "second", "video", [("c", 1), ("d", 3)])
    rows = {
        "train": ["first/a.mp4", "first/b.mp4", "first/../first/b.mp4"],
        "held_out": ["second/c.mp4", "second/d.mp4"],
    }
    for name, paths in rows.items():
        _write_table(tmp_path / f"{name}{suffix}", [{"video": path, "caption": path} for path in paths])
    assert _notes("video", tmp_path / f"train{suffix}", tmp_path / f"held_out{suffix}") == (
        "1 clip held out and trained on at once, by content: second/c.mp4 = first/a.mp4",
        "1 clip in training more than once, by content: first/b.mp4 = first/../first/b.mp4",
    )


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        elif path.suffix == ".json":
            json.dump(rows, file)
        else:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
