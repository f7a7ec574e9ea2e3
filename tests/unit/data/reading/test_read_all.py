"""Every clip is read to its end beforehand, of all three kinds, and what is damaged behind its beginning is
named; the loader replaces the same clips."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aiprod_ds.cli import BAD_CONFIGURATION, DONE, main
from aiprod_ds.config.data import AudioDataConfig
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.audio_dataset import AudioClipDataset
from aiprod_ds.data.dataset import ClipRequest, VideoClipDataset
from aiprod_ds.data.latent_dataset import LatentDataset
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import CONDITIONS, LATENTS, LatentShape, entry_path, write_entry
from aiprod_ds.data.loader import ClipLoader
from aiprod_ds.data.manifest import scan
from aiprod_ds.data.reading import replacing
from aiprod_ds.data.reading.read_all import unread_clips
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import write_sound
from aiprod_ds.trainers.clip_data import ClipData

CLIPS, DAMAGED = 6, 2
SHAPE = LatentShape(frames=5, height=16, width=16)
STRIDES = ModelStrides(spatial=4, temporal=2)


def damage(path: Path) -> None:
    """Changes half of a file in the middle, where no header stands."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) * 3 // 10, len(content) * 8 // 10):
        content[place] ^= 0x5A
    path.write_bytes(content)


@pytest.fixture
def videos(tmp_path: Path) -> VideoClipDataset:
    paths = write_synthetic_clips(tmp_path, num_clips=CLIPS, frames=9, height=32, width=32, seed=1)
    dataset = VideoClipDataset(scan(tmp_path), seed=0)
    damage(paths[DAMAGED])
    return dataset


@pytest.fixture
def sounds(tmp_path: Path) -> AudioClipDataset:
    noise_CN = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 40_000)).astype(np.float32)
    for number in range(CLIPS):
        write_sound(tmp_path / f"{number}.flac", noise_CN, codec="flac", layout="mono")
    config = AudioDataConfig(train="unused", sample_rate_hz=48_000, channels=1)
    dataset = AudioClipDataset(scan(tmp_path, medium="sound"), seed=0, config=config)
    damage(tmp_path / f"{DAMAGED}.flac")
    return dataset


@pytest.fixture
def latents(tmp_path: Path) -> LatentDataset:
    media = {"frames": "24", "fps": "24.0", "seconds": "1.0", "height": "36", "width": "64"}
    facts = {f"media_{name}": value for name, value in media.items()} | {"fps": "24.0", "fingerprint": "f"}
    for number in range(CLIPS):
        clip = f"{number}.mp4"
        path = entry_path(tmp_path, LATENTS, f"{clip}@{SHAPE.tag}")
        write_entry(path, {"latents": torch.zeros(4, 3, 4, 4)}, {**facts, "media_sha256": clip})
        prompt = {"prompt_embeds": torch.zeros(6, 3), "prompt_attention_mask": torch.ones(6)}
        write_entry(entry_path(tmp_path, CONDITIONS, clip), prompt, {"fingerprint": "t"})
    dataset = LatentDataset(scan_latents(tmp_path, LatentNeeds(strides=STRIDES)), seed=0, strides=STRIDES)
    path = entry_path(tmp_path, LATENTS, f"{DAMAGED}.mp4@{SHAPE.tag}")
    path.write_bytes(path.read_bytes()[:-7])
    return dataset


def _bucket(frames: int, size: int) -> BucketPlan:
    return BucketPlan(
        frames=frames,
        requested_frames=frames,
        height=size,
        width=size,
        frame_rate_hz=None,
        global_batch_size=3,
        micro_batch_size=3,
        accumulation=1,
    )


BUCKETS = {"videos": _bucket(9, 16), "sounds": _bucket(30_000, 1), "latents": _bucket(5, 16)}
REASONS = {
    "videos": "must be a decodable video, got: ",
    "sounds": "must be a decodable sound, got: ",
    "latents": "must be a whole file of tensors, got: ",
}


def _unread(dataset: Any, bucket: BucketPlan, **settings: Any) -> dict[int, str]:
    def requests(index: int) -> list[ClipRequest]:
        shape = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        return [ClipRequest(sample_index=index, epoch=0, augment=False, **shape)]

    found = unread_clips(
        dataset, range(CLIPS), name_of=str, requests=requests, title="reading clip", **settings
    )
    assert [clip.name for clip in found] == [str(clip.sample_index) for clip in found]
    return {clip.sample_index: clip.reason for clip in found}


@pytest.mark.parametrize("kind", ["videos", "sounds", "latents"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_clip_that_is_damaged_in_the_middle_is_named(
    kind: str, num_workers: int, request: pytest.FixtureRequest
) -> None:
    found = _unread(request.getfixturevalue(kind), BUCKETS[kind], num_workers=num_workers)
    assert list(found) == [DAMAGED]
    assert REASONS[kind] in found[DAMAGED]


@pytest.mark.parametrize("kind", ["videos", "sounds", "latents"])
def test_the_loader_replaces_the_clip_that_was_named(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacing, "WAITS_SECONDS", (0.001,))
    samples = BucketSamples(indices=tuple(range(CLIPS)), global_batch_size=3)
    loader = ClipLoader(
        request.getfixturevalue(kind),
        PhaseSampler(seed=3, phase=0, buckets=[samples]),
        [BUCKETS[kind]],
        rank=0,
        world_size=1,
        start_position=0,
        num_workers=1,
        augment=False,
        flip=False,
    )
    with closing(loader):
        batches = list(islice(loader, 6))
    assert {clip.sample_index for batch in batches for clip in batch.unread} == {DAMAGED}
    read = {sample.sample_index for batch in batches for sample in batch.samples}
    assert read == set(range(CLIPS)) - {DAMAGED}


def test_a_video_that_ends_before_its_time_is_named(tmp_path: Path) -> None:
    [path] = write_synthetic_clips(tmp_path, num_clips=1, frames=9, height=32, width=32)
    dataset = VideoClipDataset(scan(tmp_path), seed=0)
    write_synthetic_clips(tmp_path, num_clips=1, frames=5, height=32, width=32)
    with pytest.raises(DataError, match=r"must have the 9 frames that it states, got 5 that can be decoded"):
        dataset.read_whole(0)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        dataset.read_whole(0)


def test_of_a_film_only_the_scene_itself_is_read(tmp_path: Path) -> None:
    [path] = write_synthetic_clips(tmp_path, num_clips=1, frames=40, height=32, width=32)
    manifest = scan(tmp_path)
    [film] = manifest.records
    fps = film.fps
    scenes = tuple(
        replace(film, start_seconds=first / fps, end_seconds=(first + 10) / fps, frames=frames)
        for first, frames in ((0, 10), (10, 10), (30, 12))
    )
    dataset = VideoClipDataset(replace(manifest, records=scenes), seed=0)
    dataset.read_whole(0)
    dataset.read_whole(1)
    with pytest.raises(DataError, match="must have 12 frames at "):
        dataset.read_whole(2)
    damage(path)
    with pytest.raises(DataError, match="must be a decodable video"):
        dataset.read_whole(1)


class Crashing:
    """Reading one clip ends the process, as a crash of a decoder does; another one raises something odd."""

    def read_whole(self, index: int) -> None:
        if index == DAMAGED:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == DAMAGED + 1:
            raise ZeroDivisionError("frames per no second")

    def __getitem__(self, request: ClipRequest) -> Any:
        raise AssertionError("clips are read whole")


@pytest.mark.parametrize("num_workers", [1, 2, 16])
def test_a_crash_of_a_decoder_is_named_and_the_others_are_read(num_workers: int) -> None:
    assert _unread(Crashing(), BUCKETS["videos"], num_workers=num_workers) == {
        DAMAGED: "ended the process that read it (SIGKILL)",
        DAMAGED + 1: "ZeroDivisionError: frames per no second",
    }


def test_training_clips_are_tried_again_by_name(videos: VideoClipDataset) -> None:
    data = ClipData.of(videos, videos)
    plan: Any = SimpleNamespace(phases=())  # clips of files are read whole, in no shape
    names = [clip.name for clip in data.train_clips]
    assert [clip.name for clip in data.unread_for_training(plan, names[:DAMAGED])] == []
    assert [clip.name for clip in data.unread_for_training(plan, names[1:4])] == [names[DAMAGED]]


def _check(folder: Path, *settings: str) -> int:
    config = Path(__file__).parents[4] / "configs" / "video_vae" / "tiny.yaml"
    given = (f"data.train={folder}", "data.validation=null", "data.holdout_fraction=0.4", *settings)
    overrides = [part for setting in given for part in ("--set", setting)]
    return main(["check", str(config), "--output-dir", str(folder / "run"), "--read-all", *overrides])


@pytest.mark.slow
def test_the_command_lists_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_synthetic_clips(tmp_path, num_clips=CLIPS, frames=30, height=64, width=64, seed=1)
    for path in paths:
        damage(path)
    assert _check(tmp_path) == BAD_CONFIGURATION
    shown = " ".join(capsys.readouterr().err.split())
    for path in paths:
        assert f"cannot be read: {path.name}: " in shown
    for kind, count in (("training", 4), ("held-out", 2)):
        assert (
            f"data: at most 5% of the {kind} clips may be unreadable, got {count} of {count}, listed above."
            in shown
        )

    assert _check(tmp_path, "data.max_unreadable_fraction=1.0") == DONE
    shown = " ".join(capsys.readouterr().err.split())
    assert "0 of 4 training clips can be read to their end" in shown
    assert "0 of 2 held-out clips can be read to their end" in shown


def test_other_configurations_have_no_clips_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[4] / "configs" / "encode" / "tiny.yaml"
    assert main(["check", str(config), "--read-all"]) == BAD_CONFIGURATION
    assert "--read-all: is for the clips of training and validation, got a configuration of encode" in (
        capsys.readouterr().err
    )
