"""Folders of latents as data: which clips can be trained on, what is wrong with the others, and what a
request yields."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.config.data import LatentDataConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.latent_dataset import LatentDataset, require_entries
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    EMPTY_PROMPT,
    LATENTS,
    LatentShape,
    entry_name,
    entry_path,
    split_name,
    write_entry,
)
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.trainers.clip_data import split_manifests
from aiprod_ds.trainers.open_data import LatentData

STRIDES = ModelStrides(spatial=4, temporal=2)
SMALL, LARGE = LatentShape(frames=5, height=16, width=16), LatentShape(frames=9, height=32, width=32)
SILENT, SOUNDING = LatentNeeds(strides=STRIDES), LatentNeeds(strides=STRIDES, with_audio=True)
MEDIA = {
    "media_frames": "24",
    "media_fps": "24.0",
    "media_seconds": "1.0",
    "media_height": "36",
    "media_width": "64",
}


def _clip(
    root: Path, clip: str, *shapes: LatentShape, value: float = 0.0, fingerprint: str = "f" * 64
) -> None:
    """Writes latents and sounds of every shape and the embeddings of a caption."""
    made_by = {"fingerprint": fingerprint}
    for shape in shapes:
        frames, height, width = 1 + (shape.frames - 1) // 2, shape.height // 4, shape.width // 4
        facts = {**made_by, **MEDIA, "media_sha256": f"sha of {clip}", "fps": "24.0"}
        latents = torch.full((4, frames, height, width), value + shape.frames).bfloat16()
        write_entry(entry_path(root, LATENTS, f"{clip}@{shape.tag}"), {"latents": latents}, facts)
        sound = torch.full((8, shape.frames), value).bfloat16()
        facts = {**made_by, "duration": str(shape.frames / 24)}
        write_entry(entry_path(root, AUDIO_LATENTS, f"{clip}@{shape.tag}"), {"latents": sound}, facts)
    _caption(entry_path(root, CONDITIONS, clip), value)


def _caption(path: Path, value: float, tokens: int = 6) -> None:
    tensors = {
        "prompt_embeds": torch.full((tokens, 3), value).bfloat16(),
        "prompt_attention_mask": torch.arange(tokens) < 4,
    }
    write_entry(path, tensors, {"fingerprint": "t" * 64})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Media folder of three clips in two shapes."""
    for number, clip in enumerate(("a.mp4", "deep/b.mp4", "c.mov")):
        _clip(tmp_path / ".precomputed", clip, SMALL, LARGE, value=number)
    _caption(tmp_path / ".precomputed" / EMPTY_PROMPT, -1.0)
    return tmp_path


def _request(index: int, shape: LatentShape = SMALL, **changes: Any) -> ClipRequest:
    sizes = {
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "frame_rate_hz": shape.frame_rate_hz,
    }
    return ClipRequest(**{"sample_index": index, "epoch": 0, **sizes, **changes})


def _dataset(source: Path, **changes: Any) -> LatentDataset:
    return LatentDataset(
        scan_latents(source, SOUNDING), **{"seed": 0, "strides": STRIDES, "with_audio": True, **changes}
    )


def test_a_folder_its_precomputed_part_and_a_table_are_the_same_clips(folder: Path) -> None:
    (folder / "all.csv").write_text("video,caption\na.mp4,x\nc.mov,y\ndeep/b.mp4,z\n")
    found = [
        scan_latents(source, SOUNDING) for source in (folder, folder / ".precomputed", folder / "all.csv")
    ]
    assert [record.path for record in found[0].records] == ["a.mp4", "c.mov", "deep/b.mp4"]
    assert found[0] == found[1] == found[2]
    (folder / "one.csv").write_text("video\nc.mov\n")
    assert [record.path for record in scan_latents(folder / "one.csv", SOUNDING).records] == ["c.mov"]


def test_clips_state_the_facts_of_their_media(folder: Path) -> None:
    (facts, *_) = _dataset(folder).lengths()
    assert (facts.name, facts.frames, facts.seconds, facts.height, facts.width) == ("a.mp4", 24, 1.0, 36, 64)


def test_a_request_yields_the_entry_of_its_shape(folder: Path) -> None:
    item = _dataset(folder)[_request(1, LARGE)]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in item.items()} == {
        "latents": ((4, 5, 8, 8), torch.bfloat16),
        "audio_latents": ((8, 9), torch.bfloat16),
        "prompt_embeds": ((6, 3), torch.bfloat16),
        "prompt_attention_mask": ((6,), torch.bool),
        "fps": ((), torch.float32),
    }
    assert item["latents"].unique().tolist() == [2 + 9]
    assert item["fps"] == 24
    assert "audio_latents" not in _dataset(folder, with_audio=False)[_request(1)]


def test_a_shape_that_was_not_encoded_is_named_before_and_in_training(folder: Path) -> None:
    other = LatentShape(frames=9, height=16, width=16)
    with pytest.raises(DataError, match=r"latents/a\.mp4: must have latents of 9x16x16, got none"):
        _dataset(folder)[_request(0, other)]
    require_entries(_dataset(folder), _plan("16x16", 5), "c.yaml")
    entry_path(folder / ".precomputed", LATENTS, f"a.mp4@{LARGE.tag}").unlink()
    message = (
        r"c.yaml: curriculum.phases\[0\]: needs latents of 9x32x32, got none for 1 of 3 clips: a.mp4\. "
        r"Encode with this"
    )
    with pytest.raises(PlanError, match=message):
        require_entries(_dataset(folder), _plan("32x32", 9), "c.yaml")


def test_held_out_clips_of_other_shapes_are_not_measured_and_named(folder: Path) -> None:
    # As `encode` leaves them where a fraction is held out: each clip has the shape that it would train in.
    own, held_out = (_dataset(folder) for _ in range(2))
    plan = _plan("32x32", 9)
    bucket = plan.phases[0].buckets[0]
    data = LatentData.of(own, held_out)
    assert data.held_out(bucket) == (0, 1, 2)
    assert not any("not measured" in note for note in data.replacements(plan))
    for clip in ("c.mov", "deep/b.mp4"):
        entry_path(folder / ".precomputed", LATENTS, f"{clip}@{LARGE.tag}").unlink()
    assert data.held_out(bucket) == (0,)
    assert data.replacements(plan)[-1] == (
        "2 of 3 held-out clips are not measured, because they have no latents of 9x32x32: c.mov, deep/b.mp4"
    )


def _plan(resolution: str, frames: int) -> RunPlan:
    shape = {"resolution": resolution, "duration": {"frames": frames}}
    phase = {"name": "p", **shape, "global_batch_size": 2, "updates": 3, "learning_rate": 1e-3}
    values = {
        "output_dir": "o",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": [phase]},
    }
    return plan_run(VAETrainerConfig.model_validate(values), world_size=1, strides=STRIDES)


def test_latents_are_not_mirrored(folder: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be mirrored, got random_flip\. Remove augment\.random_flip"):
        _dataset(folder)[_request(0, flip=True)]


def test_captions_are_dropped_by_seed_sample_and_epoch_at_the_asked_rate(folder: Path) -> None:
    dataset = _dataset(folder, caption_dropout=0.25)

    def dropped(epoch: int, **changes: Any) -> bool:
        return bool(dataset[_request(1, epoch=epoch, **changes)]["prompt_embeds"].eq(-1).all())

    first = [dropped(epoch) for epoch in range(400)]
    assert first == [dropped(epoch) for epoch in range(400)]
    # Of a fair draw, the share lies within 4 standard deviations of sqrt(0.25 * 0.75 / 400) = 0.0217.
    assert abs(sum(first) / 400 - 0.25) < 4 * 0.0217
    assert not any(dropped(epoch, augment=False) for epoch in range(50))
    (folder / ".precomputed" / EMPTY_PROMPT).unlink()
    with pytest.raises(
        DataError, match=r"empty_prompt\.safetensors: must exist for data\.caption_dropout above 0"
    ):
        _dataset(folder, caption_dropout=0.1)


def _reasons(source: Path, needs: LatentNeeds = SOUNDING) -> dict[str, str]:
    return {item.path: item.reason for item in scan_latents(source, needs).unreadable}


@pytest.mark.parametrize("source", [LATENTS, AUDIO_LATENTS, CONDITIONS])
def test_a_missing_partner_is_listed_by_name(folder: Path, source: str) -> None:
    root = folder / ".precomputed"
    (folder / "all.csv").write_text("video\na.mp4\nc.mov\n")
    for path in (root / source).glob("a.mp4*"):
        path.unlink()
    expected = {
        LATENTS: "latents are missing",
        AUDIO_LATENTS: f"audio_latents/a.mp4@{SMALL.tag}.safetensors is missing",
        CONDITIONS: "conditions/a.mp4.safetensors is missing",
    }
    assert _reasons(folder / "all.csv") == {"a.mp4": expected[source]}


def test_a_run_without_sound_needs_no_audio_latents(folder: Path) -> None:
    for path in (folder / ".precomputed" / AUDIO_LATENTS).rglob("*.safetensors"):
        path.unlink()
    assert len(_reasons(folder)) == 3
    assert _reasons(folder, SILENT) == {}


def test_damaged_and_unfitting_entries_are_listed(folder: Path) -> None:
    root = folder / ".precomputed"
    path = entry_path(root, LATENTS, f"a.mp4@{SMALL.tag}")
    path.write_bytes(path.read_bytes()[:-1])
    _caption(entry_path(root, CONDITIONS, "deep/b.mp4"), 0.0, tokens=7)
    reasons = _reasons(folder)
    assert set(reasons) == {"a.mp4", "deep/b.mp4"}
    assert "must be a whole file of tensors" in reasons["a.mp4"]
    assert "prompt_attention_mask of conditions must be [6] as in c.mov, got [7]" in reasons["deep/b.mp4"]


def test_sound_that_does_not_last_as_long_as_its_video_is_listed(folder: Path) -> None:
    root = folder / ".precomputed"
    path = entry_path(root, AUDIO_LATENTS, f"a.mp4@{SMALL.tag}")
    write_entry(path, {"latents": torch.zeros(8, 5)}, {"duration": "0.5"})
    assert _reasons(folder) == {"a.mp4": "audio_latents must last 0.208 s as its video does, got 0.500 s"}
    write_entry(path, {"latents": torch.zeros(8, 4)}, {"duration": str(5 / 24)})
    assert (
        "length of audio_latents of 5 frames must be [8, 4] as in a.mp4@5x16x16, got [8, 5]"
        in _reasons(folder)["c.mov"]
    )


def test_latents_of_another_encoder_stop_the_scan(folder: Path) -> None:
    for source in (LATENTS, AUDIO_LATENTS):
        needs = LatentNeeds(strides=STRIDES, with_audio=True, fingerprints={source: lambda: "e" * 64})
        with pytest.raises(
            DataError,
            match=rf"{source}/.*must come from the encoder .*\(eeeeeeeeeeee\).*fingerprint ffffffffffff",
        ):
            scan_latents(folder, needs)
    right = LatentNeeds(
        strides=STRIDES,
        with_audio=True,
        fingerprints={LATENTS: lambda: "f" * 64, CONDITIONS: lambda: "t" * 64},
    )
    assert len(scan_latents(folder, right).records) == 3


def test_shapes_of_different_media_are_listed(folder: Path) -> None:
    path = entry_path(folder / ".precomputed", LATENTS, f"a.mp4@{SMALL.tag}")
    facts = {**MEDIA, "media_sha256": "another file", "fps": "24.0"}
    write_entry(path, {"latents": torch.zeros(4, 3, 4, 4)}, facts)
    assert _reasons(folder) == {
        "a.mp4": "its shapes were encoded from different media, or one of them by ltx-trainer"
    }


def test_a_folder_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"must be a folder with latents/ or \.precomputed/latents/.*got none\. Run `aiprod-ds encode`",
    ):
        scan_latents(tmp_path, SILENT)


@pytest.fixture
def ltx_tree(tmp_path: Path) -> Path:
    """What ltx-trainer writes: one entry a clip, without the media's suffix."""
    for source in (LATENTS, AUDIO_LATENTS, CONDITIONS):
        (tmp_path / ".precomputed" / source / "sub").mkdir(parents=True)
    for clip, frames in (("a", 3), ("sub/b", 5)):
        latents = torch.full((4, frames, 4, 8), float(frames))
        video = {"latents": latents, "num_frames": frames, "height": 4, "width": 8, "fps": 24.0}
        seconds = (1 + 2 * (frames - 1)) / 24
        sound = {
            "latents": torch.zeros(8, frames, 16),
            "num_time_steps": frames,
            "frequency_bins": 16,
            "duration": seconds,
        }
        prompt = {
            "prompt_embeds": torch.ones(6, 3),
            "prompt_attention_mask": torch.tensor([1, 1, 0, 0, 0, 0]),
        }
        for source, values in ((LATENTS, video), (AUDIO_LATENTS, sound), (CONDITIONS, prompt)):
            torch.save(values, tmp_path / ".precomputed" / source / f"{clip}.pt")
    return tmp_path


def _never() -> str:
    raise AssertionError("asked for, though no entry has one to compare")


def test_ltx_trainers_tree_is_read_as_it_is(ltx_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    needs = LatentNeeds(strides=STRIDES, with_audio=True, fingerprints={LATENTS: _never})
    with caplog.at_level(logging.WARNING):
        manifest = scan_latents(ltx_tree, needs)
    assert manifest.unreadable == ()
    assert "latents without fingerprint are not compared with the encoders" in caplog.text
    dataset = LatentDataset(manifest, seed=0, strides=STRIDES, with_audio=True)
    assert [(facts.name, facts.frames, facts.height, facts.width) for facts in dataset.lengths()] == [
        ("a", 5, 16, 32),
        ("sub/b", 9, 16, 32),
    ]
    item = dataset[_request(1, LatentShape(frames=9, height=16, width=32))]
    assert item["latents"].shape == (4, 5, 4, 8)
    assert item["audio_latents"].shape == (8, 5, 16)
    assert item["prompt_attention_mask"].tolist() == [True, True, False, False, False, False]
    with pytest.raises(DataError, match="must have latents of 5x16x32, got none"):
        dataset[_request(1, LatentShape(frames=5, height=16, width=32))]
    assert dataset.without_entry([0, 1], _plan("16x32", 5).phases[0].buckets[0]) == ("sub/b",)
    (ltx_tree / "table.csv").write_text("media_path,caption\nsub/b.mp4,x\n")
    assert [record.path for record in scan_latents(ltx_tree / "table.csv", needs).records] == ["sub/b"]


def test_latents_split_like_media(folder: Path) -> None:
    config = LatentDataConfig(train=str(folder), holdout_fraction=0.3)
    train, held = split_manifests(config, lambda path: scan_latents(path, SOUNDING), seed=0)
    assert (len(train.records), len(held.records)) == (2, 1)
    assert not {record.path for record in train.records} & {record.path for record in held.records}


@pytest.mark.parametrize("clip", ["new\nline.mp4", "a@9x24x40.mp4", "x.mp4#t=0.5,1"])
def test_the_name_of_an_entry_gives_back_clip_and_shape(clip: str) -> None:
    assert split_name(entry_name(clip, SMALL)) == (clip, SMALL)
