"""Files of latents: names and shapes, writing whole or not at all, reading ours and ltx-trainer's, damaged
and hostile ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from aiprod_ds.data.latents import (
    LatentShape,
    entry_name,
    entry_path,
    find_entry,
    read_entry,
    read_header,
    remove_parts,
    require_inside,
    split_name,
    write_entry,
)
from aiprod_ds.errors import DataError

_SHAPES = [
    (LatentShape(frames=17, height=512, width=768), "a/b.mp4@17x512x768"),
    (LatentShape(frames=17, height=512, width=768, frame_rate_hz=24.0), "a/b.mp4@17x512x768@24hz"),
    (
        LatentShape(frames=1, height=32, width=32, frame_rate_hz=24000 / 1001),
        "a/b.mp4@1x32x32@23.976023976023978hz",
    ),
]


@pytest.mark.parametrize(("shape", "name"), _SHAPES)
def test_names_say_clip_and_shape(shape: LatentShape, name: str) -> None:
    assert entry_name("a/b.mp4", shape) == name
    assert split_name(name) == ("a/b.mp4", shape)


@pytest.mark.parametrize("name", ["a/b", "a/b.mp4", "me@home.mp4", "x@17x512", "@9x8x8"])
def test_names_without_shape_are_clips(name: str) -> None:
    assert split_name(name) == (name, None)


@pytest.mark.parametrize("clip", ["/etc/passwd", "../a.mp4", "a/../../b.mp4"])
def test_clips_outside_the_folder_are_refused(clip: str) -> None:
    with pytest.raises(DataError, match="must be relative and lead into the manifest's folder"):
        require_inside(clip)
    require_inside("a/b..c.mp4")


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = entry_path(tmp_path, "latents", "deep/er/a.mp4")
    tensors = {
        "latents": torch.randn(4, 2, 3, 5).bfloat16().transpose(1, 2),
        "mask": torch.tensor([True, False]),
    }
    write_entry(path, tensors, {"fps": "24.0"})
    found = read_entry(path)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    header = read_header(path)
    assert header.metadata == {"fps": "24.0"}
    assert header.shapes == {"latents": (4, 3, 2, 5), "mask": (2,)}
    assert find_entry(tmp_path, "latents", "deep/er/a.mp4") == path
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_failing_write_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_entry(path, {"latents": torch.zeros(3)}, {})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_entry(path, {"latents": torch.ones(3)}, {})
    assert torch.equal(read_entry(path)["latents"], torch.zeros(3))
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_ltx_trainers_files_are_read(tmp_path: Path) -> None:
    latents = torch.randn(4, 2, 3, 5)
    (tmp_path / "latents").mkdir()
    values = {"latents": latents, "num_frames": torch.tensor(2), "height": 3, "width": 5, "fps": 25.0}
    torch.save(values, tmp_path / "latents" / "a.pt")
    path = find_entry(tmp_path, "latents", "a")
    assert path is not None
    assert torch.equal(read_entry(path)["latents"], latents)
    assert read_header(path).metadata == {"num_frames": "2", "height": "3", "width": "5", "fps": "25"}


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path: Path) -> None:
    torch.save({"latents": Bomb(tmp_path / "crater")}, tmp_path / "a.pt")
    for read in (read_entry, read_header):
        with pytest.raises(
            DataError, match=r"a\.pt: must be a whole file of tensors, got: Weights only load failed"
        ):
            read(tmp_path / "a.pt")
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"latents": torch.randn(4, 64)}, path)
    else:
        write_entry(path, {"latents": torch.randn(4, 64)}, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    for read in (read_entry, read_header):
        with pytest.raises(DataError, match="must be a whole file of tensors"):
            read(path)


def test_a_header_that_claims_a_gigabyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**30).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="must be a whole file of tensors"):
        read_header(path)
    torch.save([torch.zeros(2)], tmp_path / "b.pt")
    with pytest.raises(DataError, match="got: a list"):
        read_entry(tmp_path / "b.pt")
