"""Latents and media read out of shards are those of the folder: the same clips, in the same order, bit for
bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.cli import main
from aiprod_ds.config.data import AudioDataConfig, LatentDataConfig, StorageConfig, VideoDataConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.clip_list import Listing, list_files
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.latent_dataset import LatentDataset
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    EMPTY_PROMPT,
    LATENTS,
    LatentShape,
    entry_path,
    write_entry,
)
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.data.packed.media import open_source, packed_media
from aiprod_ds.data.packed.packing import make_index, pack_latents, pack_media
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.shards.reader import ShardReader
from aiprod_ds.shards.storage import INDEX, FolderStorage
from aiprod_ds.trainers.open_data import open_audio_files, open_video_files

STRIDES = ModelStrides(spatial=4, temporal=2)
SHAPES = (LatentShape(frames=5, height=16, width=16), LatentShape(frames=9, height=32, width=32))
NEEDS = LatentNeeds(strides=STRIDES, with_audio=True)
MEDIA = {"media_frames": "24", "media_fps": "24.0", "media_seconds": "1.0"}
MEDIA |= {"media_height": "36", "media_width": "64"}


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """Folder of three clips in two shapes, one with two captions, and the empty caption."""
    draw = torch.Generator().manual_seed(0)
    for number, clip in enumerate(("b.mp4", "deep/a.mp4", "c.mov")):
        for shape in SHAPES:
            name = f"{clip}@{shape.tag}"
            facts = {**MEDIA, "media_sha256": f"{number:064d}", "fps": "24.0", "fingerprint": "f" * 64}
            size = (4, 1 + (shape.frames - 1) // 2, shape.height // 4, shape.width // 4)
            _write(entry_path(tmp_path / "l", LATENTS, name), draw, facts, latents=size)
            facts = {"duration": str(shape.frames / 24)}
            _write(entry_path(tmp_path / "l", AUDIO_LATENTS, name), draw, facts, latents=(8, shape.frames))
        more = {"prompt_embeds.1": (6, 3)} if number == 1 else {}
        _write(entry_path(tmp_path / "l", CONDITIONS, clip), draw, {}, prompt_embeds=(6, 3), **more)
    _write(tmp_path / "l" / EMPTY_PROMPT, draw, {}, prompt_embeds=(6, 3))
    return tmp_path / "l"


def _write(path: Path, draw: torch.Generator, facts: Mapping[str, str], **shapes: tuple[int, ...]) -> None:
    tensors: dict[str, Tensor] = {
        name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()
    }
    for name in [name for name in tensors if name.startswith("prompt_embeds")]:
        tensors[name.replace("prompt_embeds", "prompt_attention_mask")] = torch.arange(6) < 4
    write_entry(path, tensors, facts)


def _packed(source: Path, folder: Path, **changes: Any) -> ShardReader:
    pack_latents(source, FolderStorage(folder), **{"shard_bytes": 4000, **changes})
    shards = open_source(str(folder), StorageConfig())
    assert isinstance(shards, ShardReader)
    return shards


def _items(manifest: Manifest) -> Iterator[dict[str, Tensor]]:
    dataset = LatentDataset(manifest, seed=3, strides=STRIDES, with_audio=True, caption_dropout=0.3)
    for index in range(len(dataset)):
        for epoch in range(4):
            for shape in SHAPES:
                yield dataset[
                    ClipRequest(
                        sample_index=index,
                        epoch=epoch,
                        frames=shape.frames,
                        height=shape.height,
                        width=shape.width,
                    )
                ]


def _require_equal(first: Manifest, second: Manifest) -> None:
    assert first.records == second.records
    assert first.unreadable == second.unreadable
    for one, other in zip(_items(first), _items(second), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_latents_in_shards_are_those_of_the_folder(latents: Path, tmp_path: Path) -> None:
    shards = _packed(latents, tmp_path / "s")
    assert len({member.shard for member in shards.members.values()}) > 1
    _require_equal(scan_latents(latents, NEEDS), scan_latents(shards, NEEDS))


def test_entries_of_a_clip_lie_together(latents: Path, tmp_path: Path) -> None:
    names = list(_packed(latents, tmp_path / "s").members)
    assert names[0] == EMPTY_PROMPT
    assert names[1:6] == [
        "conditions/b.mp4.safetensors",
        "latents/b.mp4@5x16x16.safetensors",
        "audio_latents/b.mp4@5x16x16.safetensors",
        "latents/b.mp4@9x32x32.safetensors",
        "audio_latents/b.mp4@9x32x32.safetensors",
    ]


def test_unpacked_shards_are_the_folder_and_their_index_can_be_made_anew(
    latents: Path, tmp_path: Path
) -> None:
    shards = _packed(latents, tmp_path / "s")
    files = {str(path.relative_to(latents)): path.read_bytes() for path in latents.rglob("*.safetensors")}
    assert {name: shards.read(name) for name in shards.members} == files
    before = (tmp_path / "s" / INDEX).read_bytes()
    (tmp_path / "s" / INDEX).unlink()
    make_index(FolderStorage(tmp_path / "s"))
    assert (tmp_path / "s" / INDEX).read_bytes() == before


def test_rows_of_a_table_choose_and_order_the_clips(latents: Path, tmp_path: Path) -> None:
    latents.rename(tmp_path / ".precomputed")
    table = tmp_path / "some.csv"
    table.write_text("video\nc.mov\nb.mp4\n")
    _require_equal(scan_latents(table, NEEDS), scan_latents(_packed(table, tmp_path / "s"), NEEDS))
    table.write_text("video\nc.mov\nother.mp4\n")
    with pytest.raises(DataError, match=r"every row must have latents.*got none for other\.mp4"):
        _packed(table, tmp_path / "t")
    shards = _packed(table, tmp_path / "t", skip_missing=True)
    assert [record.path for record in scan_latents(shards, NEEDS).records] == ["c.mov"]


def test_files_of_ltx_trainer_are_packed_with_their_numbers(tmp_path: Path) -> None:
    root = tmp_path / ".precomputed"
    for name in ("a", "b"):
        tensors: dict[str, Any] = {"latents": torch.randn(4, 3, 4, 4), "fps": 24.0, "num_frames": 3}
        for source, content in (
            (LATENTS, tensors),
            (CONDITIONS, {"prompt_embeds": torch.randn(6, 3), "prompt_attention_mask": torch.arange(6) < 4}),
        ):
            (root / source).mkdir(parents=True, exist_ok=True)
            torch.save(content, root / source / f"{name}.pt")
    silent = replace(NEEDS, with_audio=False)
    found, packed = scan_latents(tmp_path, silent), scan_latents(_packed(tmp_path, tmp_path / "s"), silent)
    assert found.records == packed.records
    request = ClipRequest(sample_index=1, epoch=0, frames=5, height=16, width=16)
    one, other = (LatentDataset(manifest, seed=0, strides=STRIDES)[request] for manifest in (found, packed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_of_the_same_files_are_left_as_they_are(latents: Path, tmp_path: Path) -> None:
    _packed(latents, tmp_path / "s")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    _packed(latents, tmp_path / "s")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == stamps
    draw = torch.Generator().manual_seed(1)
    _write(latents / EMPTY_PROMPT, draw, {}, prompt_embeds=(6, 3))
    with pytest.raises(DataError, match="must be empty"):
        _packed(latents, tmp_path / "s")


def test_the_list_of_clips_is_that_of_the_folder(latents: Path, tmp_path: Path) -> None:
    lists = []
    for manifest in (scan_latents(latents, NEEDS), scan_latents(_packed(latents, tmp_path / "s"), NEEDS)):
        listing = Listing(train=manifest, validation=manifest, by="content", beside=(EMPTY_PROMPT,))
        lists.append(list_files(listing, selection={}))
    assert lists[0].sha256 == lists[1].sha256
    assert lists[0].num_training == 3


def test_shards_of_something_else_are_refused(latents: Path, tmp_path: Path) -> None:
    shards = _packed(latents, tmp_path / "s")
    with pytest.raises(DataError, match="must be shards of clips, got latents"):
        packed_media(shards, "video")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four clips with captions beside them, one of which has two."""
    folder = tmp_path_factory.mktemp("clips")
    for path in write_synthetic_clips(folder / "deep", num_clips=4, frames=12, height=32, width=48):
        path.with_suffix(".txt").write_text(f"about {path.name}")
    (folder / "deep" / "clip_00000.txt").write_text("one\ntwo\n")
    return folder


def test_clips_in_shards_are_those_of_the_folder(clips: Path, tmp_path: Path) -> None:
    pack_media(clips, FolderStorage(tmp_path / "s"), medium="video", shard_bytes=20_000)
    opened = [
        open_video_files(VideoDataConfig(train=str(source), holdout_fraction=0.25), seed=1)
        for source in (clips, tmp_path / "s")
    ]
    assert opened[0].train_clips == opened[1].train_clips
    assert opened[0].validation_clips == opened[1].validation_clips
    assert opened[0].clip_list(selection={}).sha256 == opened[1].clip_list(selection={}).sha256
    for index in range(len(opened[0].train_clips)):
        request = ClipRequest(sample_index=index, epoch=index, frames=5, height=16, width=16, flip=True)
        one, other = (data.train[request]["video"] for data in opened)
        assert torch.equal(one, other)


def test_captions_travel_and_the_index_can_be_made_anew(clips: Path, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    pack_media(clips, storage, medium="video", shard_bytes=20_000)
    shards = open_source(str(tmp_path), StorageConfig())
    assert isinstance(shards, ShardReader)
    captions = {record.path: record.captions for record in packed_media(shards, "video").records}
    assert captions["deep/clip_00002.mp4"] == ("about clip_00002.mp4",)
    before = (tmp_path / INDEX).read_bytes()
    make_index(storage)
    assert (tmp_path / INDEX).read_bytes() == before


def test_sounds_in_shards_are_those_of_the_folder(clips: Path, tmp_path: Path) -> None:
    pack_media(clips, FolderStorage(tmp_path / "s"), medium="sound", shard_bytes=20_000)
    opened = [
        open_audio_files(
            AudioDataConfig(train=str(source), holdout_fraction=0.25, sample_rate_hz=16_000), seed=1
        )
        for source in (clips, tmp_path / "s")
    ]
    assert opened[0].train_clips == opened[1].train_clips
    for index in range(len(opened[0].train_clips)):
        request = ClipRequest(sample_index=index, epoch=3, frames=2000, height=1, width=1)
        assert torch.equal(*(data.train[request]["audio"] for data in opened))


def test_a_clip_that_cannot_be_read_is_left_out_and_named(clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "clips.jsonl"
    (tmp_path / "good.mp4").write_bytes((clips / "deep" / "clip_00001.mp4").read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"")
    table.write_text("".join(json.dumps({"video": name}) + "\n" for name in ("good.mp4", "bad.mp4")))
    index, left_out = pack_media(table, FolderStorage(tmp_path / "s"), medium="video", shard_bytes=20_000)
    assert "good.mp4" in index.members
    assert [item.path for item in left_out] == ["bad.mp4"]


def test_paths_that_lead_out_are_refused(clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "clips.csv"
    table.write_text(f"video\n{clips / 'deep' / 'clip_00001.mp4'}\n")
    with pytest.raises(DataError, match="must be relative and lead into"):
        pack_media(table, FolderStorage(tmp_path / "s"), medium="video", shard_bytes=20_000)


def test_the_command_packs_and_makes_the_index(
    latents: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", str(latents), str(tmp_path / "s"), "--shard-mb", "0.004"]) == 0
    assert "16 files of latents in " in capsys.readouterr().out
    (tmp_path / "s" / INDEX).unlink()
    assert main(["shard", "--index", str(tmp_path / "s")]) == 0
    assert main(["shard", str(clips), str(tmp_path / "c")]) == 0
    assert main(["shard", str(clips), str(tmp_path / "a"), "--sounds"]) == 0
    out = capsys.readouterr().out
    assert "8 files of clips in 1 shards" in out
    assert "8 files of sounds in 1 shards" in out
    assert main(["shard", str(latents)]) == 2
    assert main(["shard", str(latents), str(tmp_path / "c")]) == 1
    assert "must be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"train": "folder", "storage": {"cache_gb": 5}}, "storage: has no effect unless"),
        (
            {"train": "https://host/x", "storage": {"endpoint_url": "http://localhost:9000"}},
            "without an s3:// address",
        ),
        ({"train": "s3://b/x", "storage": {"endpoint_url": "http://u:p@host"}}, "endpoint_url"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LatentDataConfig.model_validate(values)
    kept = {"train": "s3://b/x", "storage": {"cache_gb": 5, "endpoint_url": "http://localhost:9000"}}
    assert LatentDataConfig.model_validate(kept).storage.cache_gb == 5
