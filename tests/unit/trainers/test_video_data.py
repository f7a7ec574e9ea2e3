"""What a run makes of its clips: samplers, exact lengths, notes and the probe cache, on synthetic tensors and
small files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.clock import Clock
from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.synthetic import SyntheticVideoDataset, write_synthetic_clips
from aiprod_ds.decode import probe
from aiprod_ds.errors import PlanError
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.open_data import open_video_datasets, open_video_files

_VIDEO = {"resolution": "16x16", "duration": {"frames": 5}}
_IMAGE = {"resolution": "32x32", "duration": {"frames": 1}, "global_batch_size": 8}


def _plan(*phases: dict[str, Any]) -> RunPlan:
    """Phases that end after 10 updates, each with changes."""
    full = [
        {"name": f"p{n}", "global_batch_size": 4, "updates": 10, "learning_rate": 1e-3, **p}
        for n, p in enumerate(phases)
    ]
    values = {
        "output_dir": "o",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": full},
    }
    return plan_run(
        VAETrainerConfig.model_validate(values), world_size=1, strides=ModelStrides(spatial=16, temporal=4)
    )


def _clips(*frames: int, size: int = 32) -> list[torch.Tensor]:
    return [
        SyntheticVideoDataset(len(frames), count, size, size)[index] for index, count in enumerate(frames)
    ]


def _data(*frames: int, size: int = 32) -> ClipData:
    return open_video_datasets(_clips(*frames, size=size), _clips(9, 9, size=size), seed=0)


def _epochs(count: int, **changes: Any) -> dict[str, Any]:
    return {"updates": None, "epochs": count, "schedule": "constant", **changes}


def test_lengths_are_those_that_the_stream_runs_through() -> None:
    data = _data(5, 5, 5, 5, 5, 1, 1)
    buckets = [{**_VIDEO, "share": 0.75}, {**_IMAGE, "share": 0.25}]
    plan = data.with_lengths(
        _plan(_epochs(3, **_VIDEO), _epochs(2, buckets=buckets), _epochs(2, buckets=[_VIDEO, _IMAGE])), "c"
    )

    # 3 * 5 / 4; 2 * 7 samples at 0.75 * 4 + 0.25 * 8 an update; 2 * 5 / 4 and 2 * 2 / 8; each rounded up.
    assert [phase.updates for phase in plan.phases] == [4, 3, 3 + 1]
    for phase in plan.phases:
        stream = data.stream(phase, Clock(phase=phase.index), rank=0, world_size=1, seed=3, num_workers=0)
        assert phase.updates is not None
        assert phase.end.epochs is not None
        assert stream.epoch_at(phase.updates - 1) < phase.end.epochs <= stream.epoch_at(phase.updates)
        stream.close()


def test_epochs_that_end_within_the_warm_up_are_refused() -> None:
    with pytest.raises(
        PlanError, match=r"c: curriculum.phases\[0\].epochs: must last longer than warmup_updates \(2\)"
    ):
        _data(5, 5, 5, 5, 5).with_lengths(_plan(_epochs(1, warmup_updates=2, **_VIDEO)), "c")


def test_images_and_videos_are_mixed_by_share() -> None:
    data = _data(9, 9, 9, 9, 1)
    (phase,) = _plan({"buckets": [{**_VIDEO, "share": 0.8}, {**_IMAGE, "share": 0.2}]}).phases
    stream = data.stream(phase, Clock(), rank=0, world_size=1, seed=0, num_workers=0)
    batches = list(islice(stream, 10))
    assert Counter(tuple(batch.tensors["video"].shape) for batch in batches) == {
        (4, 3, 5, 16, 16): 8,
        (8, 3, 1, 32, 32): 2,
    }
    assert [batch.bucket for batch in batches] == [stream.bucket_at(position) for position in range(10)]
    images = {sample.sample_index for batch in batches if batch.bucket == 1 for sample in batch.samples}
    assert images == {0, 1, 2, 3, 4}
    stream.close()


def test_clips_that_no_bucket_takes_are_listed() -> None:
    data = _data(9, 4, 1)
    plan = _plan(_VIDEO, {"buckets": [_VIDEO, _IMAGE]})
    assert data.clip_counts(plan) == [[1], [1, 2]]
    assert [(short.phase, short.names) for short in data.check(plan, "c")] == [
        ("p0", ("dataset[1]", "dataset[2]"))
    ]
    assert data.summary(data.check(plan, "c")).too_short == (
        ("dataset[1]", "under 5 frames, unused in phase p0"),
        ("dataset[2]", "under 5 frames, unused in phase p0"),
    )


def test_what_clips_lack_is_said() -> None:
    data = _data(9, 9, 9, 4, 1, size=16)
    buckets = [{**_VIDEO, "share": 0.5}, {**_IMAGE, "share": 0.5}]
    assert data.replacements(_plan(_VIDEO, {"buckets": buckets})) == (
        "phase p0: 3 clips are fewer than one global batch of 4, so clips repeat inside a batch",
        "phase p1, bucket 0: 1 clip is shorter than 5 frames and not drawn: dataset[3]",
        "phase p1, bucket 0: 3 clips are fewer than one global batch of 4, so clips repeat inside a batch",
        (
            "phase p1, bucket 1: 5 clips are smaller than 32x32 and enlarged: dataset[0], dataset[1], "
            "dataset[2] and 2 more"
        ),
        "phase p1, bucket 1: 5 clips are fewer than one global batch of 8, so clips repeat inside a batch",
    )
    assert _data(9, 9, 9, 9).replacements(_plan(_VIDEO)) == ()


def _config(folder: Path) -> VideoDataConfig:
    return VideoDataConfig(train=str(folder), holdout_fraction=0.3)


def test_files_are_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPROD_DS_CACHE_DIR", str(tmp_path / "cache"))
    write_synthetic_clips(tmp_path / "clips", num_clips=3, frames=5, height=32, width=32, with_sound=False)
    first = open_video_files(_config(tmp_path / "clips"), seed=0)

    hashed: list[Path] = []
    monkeypatch.setattr(probe, "file_sha256", hashed.append)
    second = open_video_files(_config(tmp_path / "clips"), seed=0)

    assert hashed == []
    assert (second.train_clips, second.validation_clips) == (first.train_clips, first.validation_clips)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_slow_clips_are_said_to_repeat_frames() -> None:
    clips = [{"video": clip, "fps": 8.0} for clip in _clips(9, 9, 9, 9)]
    data = open_video_datasets(clips, clips, seed=0)
    asked = {"resolution": "16x16", "duration": {"frames": 5, "frame_rate_hz": 12.0}}
    assert data.replacements(_plan(asked)) == (
        (
            "phase p0: 4 clips are slower than 12 Hz, so some frames come twice: dataset[0], dataset[1], "
            "dataset[2] and 1 more"
        ),
    )


def test_buckets_are_not_found_for_clips_that_nobody_knows() -> None:
    plan = _plan({**_VIDEO, "buckets": "auto"})
    data = _data(9, 5)
    empty = replace(data, train_clips=())
    with pytest.raises(
        PlanError, match=r"c: curriculum\.phases\[0\]\.buckets: auto needs clips that are known"
    ):
        empty.with_buckets(plan, "c")
    assert empty.with_buckets(_plan(_VIDEO), "c") == _plan(_VIDEO)
    found = data.with_buckets(plan, "c")
    assert [(bucket.frames, bucket.height, bucket.width) for bucket in found.phases[0].buckets] == [
        (5, 16, 16)
    ]
    assert data.found_buckets(found)[0].startswith(
        "phase p0: found for 2 of 2 clips (100%): 5 frames 16x16, "
    )
    assert data.found_buckets(found)[0] in data.replacements(found)
