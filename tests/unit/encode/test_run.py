"""Encoding on one process: what is written and under which name, what is skipped, done again, refused and
listed."""

from __future__ import annotations

import io
import json
import logging
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from aiprod_ds import progress
from aiprod_ds.codec.encoders import AudioEncoder, AudioForm, VideoEncoder, vae_fingerprint
from aiprod_ds.codec.normalization import LatentNormalization, normalization_of
from aiprod_ds.codec.tiling import check_tiles
from aiprod_ds.config.encode import AudioEncoderConfig, EncodeConfig, TilingConfig, VideoEncoderConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.latent_dataset import LatentDataset
from aiprod_ds.data.latent_index import LatentNeeds, scan_latents
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    EMPTY_PROMPT,
    FOUND_BUCKETS,
    LATENTS,
    LatentShape,
    default_folder,
    entry_path,
    read_entry,
    read_header,
)
from aiprod_ds.data.loudness import loudness_lufs
from aiprod_ds.data.manifest import Manifest, scan
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.data.treatment import duplicate_notes
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.encode.media import read_pictures, read_sound, start_seconds
from aiprod_ds.encode.reader import Failure
from aiprod_ds.encode.run import EncodeSummary, run_encoding
from aiprod_ds.encode.summary import summary_text
from aiprod_ds.encode.work import check_encoding
from aiprod_ds.errors import ConfigError, DataError, EngineError, PlanError
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.awkward import Coding, write_film, write_sound
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_ltx_vae
from aiprod_ds.trainers.open_data import LatentData

pytestmark = pytest.mark.slow

STRIDES = ModelStrides(spatial=4, temporal=2)
TINY = "aiprod_ds.testing.tiny:TinyVideoVAE"
OOBLECK = {
    "audio_channels": 1,
    "sampling_rate": 16_000,
    "encoder_hidden_size": 8,
    "decoder_channels": 8,
    "decoder_input_channels": 4,
    "downsampling_ratios": [4, 8],
    "channel_multiples": [1, 2],
}
T5 = {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
AUDIO = {"model": {"source": "AutoencoderOobleck", "config": OOBLECK}, "precision": "fp32"}
TEXT = {"source": "T5EncoderModel", "config": T5, "precision": "fp32", "max_tokens": 24}
CPU = torch.device("cpu")


def _config(folder: Path, **changes: Any) -> EncodeConfig:
    data = {"media": str(folder / "clips.csv"), "num_workers": 0, **changes.pop("data", {})}
    shapes = [{"resolution": "16x16", "duration": {"frames": 4}}]
    values = {
        "data": data,
        "video": {"model": {"source": TINY}, "precision": "fp32"},
        "shapes": shapes,
        **changes,
    }
    return EncodeConfig.model_validate(values)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Three clips of 12 frames with sound, in a table with captions."""
    clips = write_synthetic_clips(tmp_path / "clips", num_clips=3, frames=12, height=32, width=48)
    _table(tmp_path, {f"clips/{clip.name}": f"clip {number}" for number, clip in enumerate(clips)})
    return tmp_path


def _table(folder: Path, captions: dict[str, str]) -> None:
    rows = "".join(f"{path},{caption}\n" for path, caption in captions.items())
    (folder / "clips.csv").write_text(f"video,caption\n{rows}")


def _files(folder: Path) -> dict[str, int]:
    root = default_folder(folder)
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns for path in sorted(root.rglob("*.safetensors"))
    }


def test_every_clip_is_encoded_in_every_shape_with_its_sound_and_caption(media: Path) -> None:
    shapes = [
        {"resolution": "16x16", "duration": {"frames": 4}},
        {"resolution": "16x24", "duration": {"seconds": 0.4, "frame_rate_hz": 12.0}},
    ]
    summary = run_encoding(_config(media, shapes=shapes, audio=AUDIO, text=TEXT))
    assert (dict(summary.written), dict(summary.present)) == (
        {LATENTS: 6, AUDIO_LATENTS: 6, CONDITIONS: 3},
        {},
    )
    assert summary.failures == ()
    expected = {EMPTY_PROMPT}
    for number in range(3):
        clip = f"clips/clip_{number:05d}.mp4"
        expected |= {f"conditions/{clip}.safetensors"}
        expected |= {
            f"{source}/{clip}@{tag}.safetensors"
            for source in (LATENTS, AUDIO_LATENTS)
            for tag in ("5x16x16", "5x16x24@12hz")
        }
    assert set(_files(media)) == expected

    # What the trainer gets: 5 frames at 24 Hz are 3,333 samples at 16 kHz, 104 latents of 32; 5 at 12 Hz are
    # 208.
    manifest = scan_latents(media / "clips.csv", LatentNeeds(strides=STRIDES, with_audio=True))
    dataset = LatentDataset(manifest, seed=0, strides=STRIDES, with_audio=True, caption_dropout=0.1)
    assert manifest.unreadable == ()
    small = dataset[ClipRequest(sample_index=0, epoch=0, frames=5, height=16, width=16)]
    assert {name: tuple(tensor.shape) for name, tensor in small.items()} == {
        "latents": (4, 3, 4, 4),
        "audio_latents": (4, 104),
        "prompt_embeds": (24, 16),
        "prompt_attention_mask": (24,),
        "fps": (),
    }
    large = dataset[ClipRequest(sample_index=0, epoch=0, frames=5, height=16, width=24, frame_rate_hz=12.0)]
    assert (tuple(large["latents"].shape), tuple(large["audio_latents"].shape)) == ((4, 3, 4, 6), (4, 208))


def test_latents_are_the_normalised_mode_of_the_model(media: Path) -> None:
    run_encoding(_config(media, seed=3))
    (record, *_) = scan(media / "clips.csv").records
    shape = LatentShape(frames=5, height=16, width=16)
    pictures = read_pictures(media, record, shape)
    with torch.no_grad():
        expected, _ = build_model(ModelConfig(source=TINY), seed=3).eval().encode(pictures[None])
    file = default_folder(media) / LATENTS / f"{record.path}@5x16x16.safetensors"
    found = load_file(file)["latents"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected[0].bfloat16(), rtol=0, atol=0)
    metadata = read_header(file).metadata
    numbers = {
        "num_frames": "3",
        "height": "4",
        "width": "4",
        "fps": "24.0",
        "media_frames": "12",
        "media_sha256": record.sha256,
    }
    assert {name: metadata[name] for name in numbers} == numbers
    assert metadata["fingerprint"] == vae_fingerprint(ModelConfig(source=TINY), seed=3)


def test_what_is_done_is_skipped_and_what_changed_is_done_again(media: Path) -> None:
    config = _config(media, text=TEXT)
    run_encoding(config)
    before = _files(media)
    summary = run_encoding(config)
    assert (dict(summary.written), dict(summary.present)) == ({}, {LATENTS: 3, CONDITIONS: 3})
    assert _files(media) == before

    # One clip gets another caption, one other pictures, and the entry of the third is cut.
    _table(
        media,
        {"clips/clip_00000.mp4": "new", "clips/clip_00001.mp4": "clip 1", "clips/clip_00002.mp4": "clip 2"},
    )
    other = write_synthetic_clips(media / "other", num_clips=1, frames=12, height=32, width=48, seed=9)
    other[0].replace(media / "clips" / "clip_00001.mp4")
    cut = default_folder(media) / LATENTS / "clips" / "clip_00002.mp4@5x16x16.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    (cut.parent / "left.safetensors.77.part").write_bytes(b"half")
    assert dict(run_encoding(config).written) == {LATENTS: 2, CONDITIONS: 1}
    changed = {name for name, stamp in _files(media).items() if before[name] != stamp}
    assert changed == {
        "conditions/clips/clip_00000.mp4.safetensors",
        "latents/clips/clip_00001.mp4@5x16x16.safetensors",
        "latents/clips/clip_00002.mp4@5x16x16.safetensors",
    }
    assert not list(media.rglob("*.part"))


def test_entries_of_another_encoder_are_not_mixed(media: Path) -> None:
    run_encoding(_config(media))
    before = _files(media)
    with pytest.raises(
        DataError, match=r"was made by another encoder \(\w{12}, now \w{12}\)\. Name another data\.output_dir"
    ):
        run_encoding(_config(media, seed=1))
    assert _files(media) == before
    assert (
        run_encoding(_config(media, seed=1, data={"output_dir": str(media / "second")})).written[LATENTS] == 3
    )


def test_results_do_not_depend_on_workers(media: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folders = [tmp_path_factory.mktemp("workers") for _ in range(2)]
    for folder, workers in zip(folders, (0, 2), strict=True):
        run_encoding(_config(media, audio=AUDIO, data={"output_dir": str(folder), "num_workers": workers}))
    names = sorted(str(path.relative_to(folders[0])) for path in folders[0].rglob("*.safetensors"))
    assert len(names) == 6
    for name in names:
        one, two = (folder / name for folder in folders)
        assert torch.equal(load_file(one)["latents"], load_file(two)["latents"])
        assert read_header(one) == read_header(two)


def test_clips_follow_the_buckets_of_a_curriculum(tmp_path: Path) -> None:
    for name, frames, height, width in (("wide", 12, 32, 64), ("tall", 12, 64, 32), ("short", 4, 32, 64)):
        write_synthetic_clips(tmp_path / name, num_clips=1, frames=frames, height=height, width=width)
    _table(tmp_path, {f"{name}/clip_00000.mp4": "x" for name in ("wide", "tall", "short")})
    buckets = [{"resolution": size, "duration": {"frames": 5}} for size in ("16x32", "32x16")]
    phases = [
        {"name": "low", "resolution": "16x16", "duration": {"frames": 3}},
        {"name": "high", "buckets": buckets},
    ]
    common = {"global_batch_size": 2, "updates": 3, "learning_rate": 1e-3}
    (tmp_path / "c.yaml").write_text(
        json.dumps({"curriculum": {"phases": [{**phase, **common} for phase in phases]}})
    )
    summary = run_encoding(_config(tmp_path, shapes=[], curriculum=str(tmp_path / "c.yaml")))
    assert summary.too_short == ()
    assert {name.removeprefix("latents/").removesuffix(".safetensors") for name in _files(tmp_path)} == {
        "wide/clip_00000.mp4@3x16x16",
        "wide/clip_00000.mp4@5x16x32",
        "tall/clip_00000.mp4@3x16x16",
        "tall/clip_00000.mp4@5x32x16",
        "short/clip_00000.mp4@3x16x16",
    }
    assert run_encoding(_config(tmp_path)).too_short == ("short/clip_00000.mp4",)


def test_held_out_clips_are_encoded_as_they_are_measured(tmp_path: Path) -> None:
    for name, height, width in (("wide", 32, 64), ("tall", 64, 32)):
        write_synthetic_clips(tmp_path / name, num_clips=1, frames=12, height=height, width=width)
    _table(tmp_path, {f"{name}/clip_00000.mp4": "x" for name in ("wide", "tall")})
    buckets = [{"resolution": size, "duration": {"frames": 5}} for size in ("16x32", "32x16")]
    common = {"global_batch_size": 2, "updates": 3, "learning_rate": 1e-3}
    phases = [
        {"name": "low", "resolution": "16x16", "duration": {"frames": 3}},
        {"name": "high", "buckets": buckets},
    ]
    (tmp_path / "c.yaml").write_text(
        json.dumps({"curriculum": {"phases": [{**phase, **common} for phase in phases]}})
    )
    run_encoding(_config(tmp_path, shapes=[], curriculum=str(tmp_path / "c.yaml"), data={"held_out": True}))
    assert set(_files(tmp_path)) == {
        f"latents/{name}/clip_00000.mp4@5x16x32.safetensors" for name in ("wide", "tall")
    }


def test_auto_buckets_of_a_curriculum_are_found_once_for_encoding_and_training(tmp_path: Path) -> None:
    sizes = {"wide": (32, 64), "wide2": (32, 64), "tall": (64, 32)}
    for name, (height, width) in sizes.items():
        write_synthetic_clips(tmp_path / name, num_clips=1, frames=12, height=height, width=width)
    write_synthetic_clips(tmp_path / "short", num_clips=1, frames=4, height=32, width=64)
    _table(tmp_path, {f"{name}/clip_00000.mp4": "x" for name in (*sizes, "short")})
    phase = {"name": "low", "resolution": "16x16", "duration": {"frames": 5}, "buckets": "auto"}
    phase |= {"micro_batch_size": 2, "updates": 3, "learning_rate": 1e-3}
    (tmp_path / "c.yaml").write_text(json.dumps({"curriculum": {"phases": [phase]}}))
    common: dict[str, Any] = {"shapes": [], "curriculum": str(tmp_path / "c.yaml"), "text": TEXT}
    config, held_out = _config(tmp_path, **common), _config(tmp_path, **common, data={"held_out": True})

    with pytest.raises(ConfigError, match=r"buckets: auto must have been found from the training clips"):
        run_encoding(held_out)
    # Of 4x4 cells, 2:1 keeps 5/6 in 3x5, all in 2x4 (8 cells are too few) and half in 2x8.
    found = "5 frames 12x20 (2 clips), 5 frames 20x12 (1 clips), 3 frames 12x20 (1 clips)"
    note = f"buckets: auto of 5x16x16, most 8, min_frames 1: {found}"
    assert note in check_encoding(config)
    summary = run_encoding(config)
    assert note in summary.notes
    tags = {"wide": "5x12x20", "wide2": "5x12x20", "tall": "5x20x12", "short": "3x12x20"}
    assert {name for name in _files(tmp_path) if name.startswith(LATENTS)} == {
        f"latents/{name}/clip_00000.mp4@{tag}.safetensors" for name, tag in tags.items()
    }

    # Training without the tall one keeps the shapes, and which of them is measured.
    rows = "".join(f"{name}/clip_00000.mp4\n" for name in ("wide", "wide2", "short"))
    (tmp_path / "train.csv").write_text(f"video\n{rows}")
    manifest = scan_latents(tmp_path / "train.csv", LatentNeeds(strides=STRIDES))
    kept = LatentDataset(manifest, seed=0, strides=STRIDES).found_buckets()
    assert list(kept.values()) == [((5, 12, 20), (5, 20, 12), (3, 12, 20))]
    # More clips do not move those that are there.
    write_synthetic_clips(tmp_path / "square", num_clips=1, frames=12, height=48, width=48)
    _table(tmp_path, {f"{name}/clip_00000.mp4": "x" for name in (*sizes, "short", "square")})
    again = run_encoding(config)
    assert dict(again.written) == {LATENTS: 1, CONDITIONS: 1}
    assert dict(again.present) == {LATENTS: 4, CONDITIONS: 4}
    assert check_encoding(held_out).startswith("5 clips, 4 latents and 5 captions")

    def opened(latents: Manifest) -> LatentData:
        own = LatentDataset(latents, seed=0, strides=STRIDES)
        return LatentData.of(own, own)

    values = {"output_dir": "o", "model": {"source": "M"}, "data": {"train": "t"}}
    run = VAETrainerConfig.model_validate({**values, "curriculum": {"phases": [phase]}})
    plan = plan_run(run, world_size=1, strides=STRIDES)
    trained = opened(manifest).with_buckets(plan, "c")
    shapes = [(bucket.frames, bucket.height, bucket.width) for bucket in trained.phases[0].buckets]
    assert shapes == [(5, 12, 20), (3, 12, 20)]
    opened(manifest).check(trained, "c")
    (default_folder(tmp_path) / FOUND_BUCKETS).unlink()
    with pytest.raises(PlanError, match=r"phases\[0\]\.buckets: auto takes the shapes that `encode` found"):
        opened(manifest).with_buckets(plan, "c")


def test_scenes_are_encoded_as_clips_of_their_own(tmp_path: Path) -> None:
    dark, light = (np.full((32, 32, 3), shade, dtype=np.uint8) for shade in (20, 220))
    write_film(tmp_path / "film.mp4", [dark] * 10 + [light] * 14, Coding(rate_hz=10))
    write_film(tmp_path / "plain.mp4", [dark] * 12, Coding(rate_hz=10))
    (tmp_path / "clips.csv").write_text("video,caption\nfilm.mp4,a film\nplain.mp4,plain\n")
    config = _config(tmp_path, text=TEXT, data={"scenes": "cut"})
    summary = run_encoding(config)
    assert dict(summary.written) == {LATENTS: 3, CONDITIONS: 3}
    assert "1 file cut into 2 scenes: film.mp4" in summary.notes
    names = ["film.mp4#t=0,1", "film.mp4#t=1", "plain.mp4"]
    assert {name for name in _files(tmp_path) if name.startswith(LATENTS)} == {
        f"latents/{name}@5x16x16.safetensors" for name in names
    }
    root = default_folder(tmp_path)
    headers = [read_header(entry_path(root, LATENTS, f"{name}@5x16x16")) for name in names]
    starts = [float(header.metadata["start_seconds"]) for header in headers]
    assert starts == [0.2, 1.4, 0.3]  # the middle 5 of 10, of 14 and of 12 frames
    assert dict(run_encoding(config).written) == {}
    manifest = scan_latents(tmp_path / "clips.csv", LatentNeeds(strides=STRIDES))
    assert [record.path for record in manifest.records] == names
    assert manifest.unreadable == ()
    assert duplicate_notes(manifest, replace(manifest, records=())) == ()


def test_tables_side_by_side_share_a_folder(media: Path) -> None:
    (media / "held_out.csv").write_text("video,caption\nclips/clip_00002.mp4,clip 2\ngone.mp4,gone\n")
    _table(media, {"clips/clip_00000.mp4": "clip 0", "clips/clip_00001.mp4": "clip 1"})
    run_encoding(_config(media, text=TEXT))
    before = _files(media)
    run_encoding(
        _config(media, text=TEXT, data={"media": str(media / "held_out.csv"), "max_failed_fraction": 0.5})
    )
    assert before.items() <= _files(media).items(), "the first run's entries stay as they are"
    found = {
        name: json.loads((default_folder(media) / f"failures_{name}.json").read_text())
        for name in ("clips", "held_out")
    }
    assert found["clips"] == {"failures": [], "too_short": []}
    assert [failure["clip"] for failure in found["held_out"]["failures"]] == ["gone.mp4"]
    needs = LatentNeeds(strides=STRIDES)
    clips = {
        name: [record.path for record in scan_latents(media / f"{name}.csv", needs).records]
        for name in ("clips", "held_out")
    }
    assert clips == {
        "clips": ["clips/clip_00000.mp4", "clips/clip_00001.mp4"],
        "held_out": ["clips/clip_00002.mp4"],
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "gone.csv",
            r"^configuration: data\.media: .*gone\.csv: must be a folder or a CSV, JSON or JSONL manifest",
        ),
        ("empty", r"^configuration: data\.media: .*empty: must hold at least one video clip, got none"),
        ("text.csv", r"no clip is readable, got 1 of 1: .*, or raise data\.max_failed_fraction\."),
    ],
)
def test_media_that_are_not_there_are_a_wrong_configuration(
    tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a film")
    (tmp_path / "text.csv").write_text("video\ntext.mp4\n")
    with pytest.raises(PlanError, match=message):
        run_encoding(_config(tmp_path, data={"media": str(tmp_path / source)}))
    assert not default_folder(tmp_path).exists()


def test_a_folder_that_cannot_be_written_is_refused_before_or_when_it_happens(media: Path) -> None:
    (media / "file").write_text("")
    with pytest.raises(
        PlanError,
        match=r"data\.output_dir: must be a folder that can be written, got .*file/latents\. Name another",
    ):
        run_encoding(_config(media, data={"output_dir": str(media / "file" / "latents")}))
    (media / "output").mkdir()
    (media / "output" / "latents").write_text("in the way")
    with pytest.raises(
        EngineError, match=r"latents/clips/clip_00000\.mp4@.*: must be writable, got .*what is encoded stays"
    ):
        run_encoding(_config(media, data={"output_dir": str(media / "output")}))


def test_the_page_names_five_clips_and_where_the_rest_is() -> None:
    summary = EncodeSummary(
        output_dir=Path("out"),
        written={LATENTS: 12, CONDITIONS: 3},
        present={CONDITIONS: 4},
        failures=tuple(
            Failure(clip=f"{number}.mp4", what="media", reason="is damaged") for number in range(7)
        ),
        too_short=("a.mp4", "b.mp4"),
        failures_file=Path("out/failures_train.json"),
        seconds=3.21,
    )
    assert summary_text(summary).splitlines() == [
        "Encoded into out in 3.2 s.",
        "                 written  present",
        "  conditions           3        4",
        "  latents             12        0",
        "Too short for every shape: 2, a.mp4, b.mp4",
        "Failed: 7",
        *(f"  {number}.mp4: media: is damaged" for number in range(5)),
        "All of them: out/failures_train.json",
    ]


def test_failing_clips_are_listed_and_do_not_stop_the_run(
    media: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_synthetic_clips(media / "mute", num_clips=1, frames=12, height=32, width=48, with_sound=False)
    (long,) = write_synthetic_clips(media / "long", num_clips=1, frames=48, height=32, width=48)
    content = bytearray(long.read_bytes())
    start, stop = (
        int(0.4 * len(content)),
        int(0.6 * len(content)),
    )  # frames in the middle, which are what is encoded
    content[start:stop] = bytes(stop - start)
    (media / "clips" / "clip_00001.mp4").write_bytes(content)
    captions = {
        "clips/clip_00000.mp4": "good",
        "clips/clip_00001.mp4": "damaged",
        "mute/clip_00000.mp4": "mute",
    }
    _table(media, {**captions, "clips/clip_00002.mp4": "x" * 40, "gone.mp4": "gone", "../out.mp4": "out"})
    (media.parent / "out.mp4").write_bytes((media / "clips" / "clip_00000.mp4").read_bytes())

    config = _config(media, audio=AUDIO, text=TEXT, data={"max_failed_fraction": 0.9})
    summary = run_encoding(config)
    assert dict(summary.written) == {LATENTS: 2, AUDIO_LATENTS: 2, CONDITIONS: 3}
    reasons = {failure.clip: (failure.what, failure.reason) for failure in summary.failures}
    assert set(reasons) == {
        "gone.mp4",
        "../out.mp4",
        "clips/clip_00001.mp4",
        "clips/clip_00002.mp4",
        "mute/clip_00000.mp4",
    }
    assert reasons["gone.mp4"][0] == "media"
    assert "its path must be relative" in reasons["../out.mp4"][1]
    assert reasons["clips/clip_00001.mp4"][0] == "latents, audio_latents of 5x16x16"
    assert "must be a decodable video" in reasons["clips/clip_00001.mp4"][1]
    assert "must have at most 24 tokens (text.max_tokens), got 41" in reasons["clips/clip_00002.mp4"][1]
    assert (
        "must have sound, got none. Set audio.missing_sound to silence" in reasons["mute/clip_00000.mp4"][1]
    )
    listed = json.loads((default_folder(media) / "failures_clips.json").read_text())
    assert {entry["clip"] for entry in listed["failures"]} == set(reasons)
    assert "clip failed: clip=mute/clip_00000.mp4" in caplog.text

    with pytest.raises(
        DataError,
        match=r"at most 30% of the clips may fail, got 5 of 6: .*All failures are in .*failures_clips\.json",
    ):
        run_encoding(_config(media, audio=AUDIO, text=TEXT, data={"max_failed_fraction": 0.3}))
    silent = {**AUDIO, "missing_sound": "silence"}
    assert (
        run_encoding(_config(media, audio=silent, text=TEXT, data={"max_failed_fraction": 0.9})).written[
            AUDIO_LATENTS
        ]
        == 3
    )


def test_a_clip_without_caption_fails_or_gets_the_default(media: Path) -> None:
    (media / "clips.csv").write_text("video,caption\nclips/clip_00000.mp4,\nclips/clip_00001.mp4,a film\n")
    with pytest.raises(PlanError, match=r"got 1 of 2 without a caption: clips/clip_00000\.mp4: it must have"):
        run_encoding(_config(media, text=TEXT))
    assert not default_folder(media).exists()
    summary = run_encoding(_config(media, text={**TEXT, "default_caption": "a film"}))
    assert summary.written[CONDITIONS] == 2
    some = run_encoding(_config(media, text=TEXT, data={"max_failed_fraction": 0.5}))
    assert [(failure.clip, failure.what) for failure in some.failures] == [
        ("clips/clip_00000.mp4", CONDITIONS)
    ]


def test_a_clip_whose_name_is_no_text_fails_by_name(media: Path) -> None:
    folder, name = media / "clips", os.fsdecode(b"caf\xe9.mp4")
    (folder / "clip_00001.mp4").rename(folder / name)
    for number in (0, 2):
        (folder / f"clip_{number:05}.txt").write_text("a film")
    summary = run_encoding(_config(media, text=TEXT, data={"media": str(folder), "max_failed_fraction": 0.5}))
    found = json.loads(summary.failures_file.read_text(encoding="utf-8"))
    assert [failure["clip"] for failure in found["failures"]] == [name]


def test_all_missing_captions_are_found_before_anything_is_encoded(media: Path) -> None:
    (media / "clips" / "clip_00001.txt").write_text("a film")
    config = _config(media, text=TEXT, data={"media": str(media / "clips")})
    message = r"got 2 of 3 without a caption: clip_00000\.mp4, clip_00002\.mp4: it must have a caption"
    for find in (run_encoding, check_encoding):
        with pytest.raises(PlanError, match=message):
            find(config)
    assert sorted(path.name for path in media.iterdir()) == ["clips", "clips.csv"]
    for number in (0, 2):
        (media / "clips" / f"clip_0000{number}.caption").write_text("another")
    assert check_encoding(config).startswith("3 clips, 3 latents and 3 captions for ")
    assert run_encoding(config).written[CONDITIONS] == 3


def test_check_says_what_will_not_be_encoded(media: Path) -> None:
    (media / "clips.csv").write_text("video,text\nclips/clip_00000.mp4,a film\ngone.mp4,gone\n")
    config = _config(media, audio=AUDIO, text=TEXT, data={"max_failed_fraction": 0.5})
    first, *lines = check_encoding(config).splitlines()
    assert first.startswith("2 clips, 1 latents and 1 captions for ")
    assert lines == [
        "Not encoded: 1",
        "  gone.mp4: media: is missing: there is no such file",
        "Note: 1 sound resampled to 16000 Hz: clips/clip_00000.mp4.",
        "Note: 1 sound stereo, averaged to one channel: clips/clip_00000.mp4.",
    ]


def test_several_captions_share_an_entry_and_are_drawn_by_the_epoch(media: Path) -> None:
    (media / "clips" / "clip_00000.txt").write_text("first\nsecond\n\nthird\n")
    for number in (1, 2):
        (media / "clips" / f"clip_0000{number}.txt").write_text("only")
    data = {"media": str(media / "clips"), "captions_per_line": True}
    config = _config(media, text={**TEXT, "trigger": "sks,"}, data=data)
    run_encoding(config)
    root = default_folder(media / "clips")
    entry = read_entry(entry_path(root, CONDITIONS, "clip_00000.mp4"))
    assert sorted(entry) == [
        f"{name}{end}" for name in ("prompt_attention_mask", "prompt_embeds") for end in ("", ".1", ".2")
    ]
    # The end token and every byte of `sks, first`, `sks, second` and `sks, third`.
    lengths = [int(entry[f"prompt_attention_mask{end}"].sum()) for end in ("", ".1", ".2")]
    assert lengths == [11, 12, 11]
    assert dict(run_encoding(config).written) == {}

    manifest = scan_latents(media / "clips", LatentNeeds(strides=STRIDES))
    assert manifest.unreadable == ()
    dataset = LatentDataset(manifest, seed=0, strides=STRIDES)

    def drawn(index: int, epoch: int, *, augment: bool = True) -> Tensor:
        request = ClipRequest(
            sample_index=index, epoch=epoch, frames=5, height=16, width=16, augment=augment, flip=False
        )
        item = dataset[request]
        assert set(item) == {"latents", "fps", "prompt_embeds", "prompt_attention_mask"}
        return item["prompt_embeds"]

    each = [drawn(0, epoch) for epoch in range(20)]
    counts = [
        sum(bool(torch.equal(one, entry[f"prompt_embeds{end}"])) for one in each) for end in ("", ".1", ".2")
    ]
    assert sum(counts) == 20
    assert min(counts) >= 2, "all are drawn"
    assert all(torch.equal(one, drawn(0, epoch)) for epoch, one in enumerate(each))
    assert all(torch.equal(drawn(0, epoch, augment=False), entry["prompt_embeds"]) for epoch in range(5))
    assert torch.equal(drawn(1, 0), drawn(1, 7))

    (media / "clips" / "clip_00000.txt").write_text("first\nsecond")
    assert dict(run_encoding(config).written) == {CONDITIONS: 1}
    assert sorted(read_entry(entry_path(root, CONDITIONS, "clip_00000.mp4"))) == [
        f"{name}{end}" for name in ("prompt_attention_mask", "prompt_embeds") for end in ("", ".1")
    ]


def test_latents_go_beside_the_media_or_where_they_are(media: Path) -> None:
    config = _config(media, data={"media": str(media / "clips")})
    summary = run_encoding(config)
    assert summary.output_dir == media / "clips_latents"
    assert sorted(path.name for path in (media / "clips").iterdir()) == [
        f"clip_0000{number}.mp4" for number in range(3)
    ]
    # A folder inside is as good: nothing in it is taken for media.
    inside = _config(media, data={"media": str(media / "clips"), "output_dir": str(media / "clips" / "out")})
    run_encoding(inside)
    again = scan(media / "clips")
    assert len(again.records) == 3
    assert (again.unreadable, again.ignored) == ((), ())
    assert dict(run_encoding(inside).present) == {LATENTS: 3}
    # What an earlier version or ltx-trainer began goes on.
    (media / "clips" / ".precomputed").mkdir()
    assert run_encoding(config).output_dir == media / "clips" / ".precomputed"


def test_a_resolution_that_the_vae_cannot_take_is_refused(media: Path) -> None:
    _table(media, {"clips/clip_00000.mp4": "x"})
    with pytest.raises(
        ConfigError,
        match=r"shapes\[0\]\.resolution: must be a multiple of the VAE's stride 4 both ways, got 18x16",
    ):
        run_encoding(_config(media, shapes=[{"resolution": "18x16", "duration": {"frames": 5}}]))


def test_clips_of_different_rates_need_a_common_one_for_sound(media: Path) -> None:
    _film(media / "slow.mkv", frames=12, rate_hz=10)
    _table(media, {"clips/clip_00000.mp4": "x", "slow.mkv": "y"})
    with pytest.raises(
        PlanError, match=r"clips of 5x16x16 must have audio latents of one length, got .*Set frame_rate_hz"
    ):
        run_encoding(_config(media, audio=AUDIO))
    shapes = [{"resolution": "16x16", "duration": {"frames": 5, "frame_rate_hz": 10.0}}]
    assert run_encoding(_config(media, audio=AUDIO, shapes=shapes)).written[AUDIO_LATENTS] == 2


def test_progress_is_written_where_there_is_no_terminal(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    log = io.StringIO()
    run_encoding(_config(media), console=Console(file=log))
    assert "encoding clips 1/3" in log.getvalue()
    assert "encoding clips 3/3: done in 0:00:0" in log.getvalue()


# Sound and pictures: the brightness of frame k is 10 * k, and the sound is the line t / 10 for t seconds
# after its first sample.

FORM = AudioForm(sample_rate_hz=8000, channels=1, hop=100)


def _film(
    path: Path, *, frames: int, rate_hz: int, sound_seconds: float | None = None, delay_seconds: float = 0.0
) -> MediaRecord:
    seconds = frames / rate_hz if sound_seconds is None else sound_seconds
    wave = (np.arange(round(seconds * 8000)) / 8000 / 10).astype(np.float32)
    with av.open(str(path), "w") as container:
        picture = container.add_stream("ffv1", rate=rate_hz)
        picture.height, picture.width, picture.pix_fmt = 32, 32, "yuv444p"
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for index in range(frames):
            grey = np.full((32, 32, 3), 10 * index, np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray((wave[None] * 32768).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, round(delay_seconds * 8000), Fraction(1, 8000)
        for packet in [*sound.encode(frame), *sound.encode(None)]:
            container.mux(packet)
    (record,) = [item for item in scan(path.parent).records if item.path == path.name]
    return record


def _sound(folder: Path, record: MediaRecord, shape: LatentShape, *, silence: bool = False) -> Tensor:
    return read_sound(folder, record, shape, FORM, fill_with_silence=silence)


@pytest.mark.parametrize("rate", [None, 4.0])
def test_pictures_and_sound_begin_together_and_last_as_long(tmp_path: Path, rate: float | None) -> None:
    record = _film(tmp_path / "a.mkv", frames=20, rate_hz=8)
    shape = LatentShape(frames=5, height=32, width=32, frame_rate_hz=rate)
    start = start_seconds(record, shape)
    first = (read_pictures(tmp_path, record, shape)[0, 0].mean() + 1) * 127.5 / 10
    assert (
        round(float(first)) == start * 8
    )  # frames of 8 Hz before the clip: 7 of 20 (15 // 2), or 5 of 20 (10 // 2)
    assert start == {None: 7 / 8, 4.0: 5 / 8}[rate]
    wave = _sound(tmp_path, record, shape)
    assert wave.shape == (1, round(5 / (rate or 8) * 8000))
    # 16-bit samples: the line is rounded down by less than 1 / 32768.
    expected = (start + torch.arange(wave.shape[1]) / 8000) / 10
    torch.testing.assert_close(wave[0], expected, rtol=0, atol=1 / 32768)


def test_sound_that_starts_late_is_where_a_player_has_it(tmp_path: Path) -> None:
    record = _film(tmp_path / "a.mkv", frames=8, rate_hz=8, sound_seconds=0.75, delay_seconds=0.25)
    wave = _sound(tmp_path, record, LatentShape(frames=8, height=32, width=32), silence=True)[0]
    expected = torch.clamp(torch.arange(8000) / 8000 - 0.25, min=0) / 10
    torch.testing.assert_close(wave, expected, rtol=0, atol=1 / 32768)


def test_sound_that_ends_early_is_filled_up_a_little_or_if_asked(tmp_path: Path) -> None:
    shape = LatentShape(frames=8, height=32, width=32)
    nearly, half = (
        _film(tmp_path / f"{number}.mkv", frames=8, rate_hz=8, sound_seconds=seconds)
        for number, seconds in enumerate((0.95, 0.5))
    )
    assert _sound(tmp_path, nearly, shape)[0, 7600:].abs().max() == 0
    with pytest.raises(
        DataError,
        match=r"must have sound for all of its pictures, got 0\.500 s less\. Set audio\.missing_sound",
    ):
        _sound(tmp_path, half, shape)
    wave = _sound(tmp_path, half, shape, silence=True)[0]
    assert wave[4000:].abs().max() == 0
    assert wave[3999] > 0.049


def test_sound_comes_from_the_file_that_the_table_names(tmp_path: Path) -> None:
    record = _film(tmp_path / "a.mkv", frames=20, rate_hz=8, delay_seconds=0.25)
    # The samples say where they are, as those of the film do, but negatively and in six channels.
    wave_CN = np.zeros((6, 40_000), dtype=np.float32)
    wave_CN[0] = -np.arange(40_000) / 8000 / 10
    write_sound(tmp_path / "a.wav", wave_CN, codec="pcm_f32le", layout="5.1", rate_hz=8000)
    (tmp_path / "clips.csv").write_text("video,audio\na.mkv,a.wav\n")
    (own,) = scan(tmp_path / "clips.csv").records
    shape = LatentShape(frames=8, height=32, width=32)
    start = start_seconds(record, shape)
    expected = -(start + torch.arange(8000) / 8000) / 10 / (1 + 2 * 0.5**0.5) / 2  # left of 5.1, averaged
    # Its first sample is heard with the first picture, whatever the delay of the film's own sound.
    torch.testing.assert_close(_sound(tmp_path, own, shape)[0], expected, rtol=0, atol=1e-6)
    assert _sound(tmp_path, record, shape)[0].mean() > 0


def test_another_sound_or_background_is_encoded_again(media: Path) -> None:
    tone = np.zeros((1, 40_000), dtype=np.float32)
    write_sound(media / "tone.wav", tone, codec="pcm_s16le", layout="mono", rate_hz=16_000)
    (media / "clips.csv").write_text("video,audio\nclips/clip_00000.mp4,tone.wav\n")
    config = _config(media, audio=AUDIO)
    first = run_encoding(config)
    assert dict(first.written) == {LATENTS: 1, AUDIO_LATENTS: 1}
    assert "1 sound silent (peak below -90 dB): clips/clip_00000.mp4" in first.notes
    assert "Note: 1 sound silent" in summary_text(first)
    assert dict(run_encoding(config).present) == {LATENTS: 1, AUDIO_LATENTS: 1}
    write_sound(media / "tone.wav", tone + 0.25, codec="pcm_s16le", layout="mono", rate_hz=16_000)
    again = run_encoding(config)
    assert (dict(again.written), dict(again.present)) == ({AUDIO_LATENTS: 1}, {LATENTS: 1})
    # Plain pictures do not depend on the background.
    white = _config(media, audio=AUDIO, data={"alpha_background": (255, 255, 255)})
    assert dict(run_encoding(white).written) == {}


def test_what_is_odd_about_sounds_is_told(tmp_path: Path) -> None:
    _film(tmp_path / "rising.mkv", frames=20, rate_hz=8)  # a mean of 0.125
    write_sound(
        tmp_path / "loud.wav",
        np.ones((1, 20_000), np.float32),
        codec="pcm_s16le",
        layout="mono",
        rate_hz=8000,
    )
    (tmp_path / "clips.csv").write_text("video\nrising.mkv\n")
    rising = run_encoding(_config(tmp_path, audio=AUDIO))
    assert "1 sound with a mean (DC) beyond 0.01: rising.mkv" in rising.notes
    assert not any("clipped" in note for note in rising.notes)
    (tmp_path / "clips.csv").write_text("video,audio\nrising.mkv,loud.wav\n")
    loud = check_encoding(_config(tmp_path, audio=AUDIO))
    assert "Note: 1 sound resampled to 16000 Hz: rising.mkv." in loud
    assert "Note: 1 sound clipped (three or more samples at full scale in a row): rising.mkv." in loud


def test_latents_for_training_have_the_sound_of_its_own_file(media: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 40_000)).astype(np.float32)
    write_sound(media / "noise.wav", noise, codec="pcm_s16le", layout="mono", rate_hz=16_000)
    found = []
    for audio in ("", "noise.wav"):
        (media / "clips.csv").write_text(f"video,audio,caption\nclips/clip_00000.mp4,{audio},a film\n")
        run_encoding(_config(media, audio=AUDIO, text=TEXT))
        manifest = scan_latents(media / "clips.csv", LatentNeeds(strides=STRIDES, with_audio=True))
        assert manifest.unreadable == ()
        dataset = LatentDataset(manifest, seed=0, strides=STRIDES, with_audio=True)
        found.append(dataset[ClipRequest(sample_index=0, epoch=0, frames=5, height=16, width=16)])
    own, other = found
    assert own["audio_latents"].shape == other["audio_latents"].shape == (4, 104)
    assert not torch.equal(own["audio_latents"], other["audio_latents"])
    assert torch.equal(own["latents"], other["latents"])


def test_sound_is_brought_to_the_loudness_of_the_vaes_training(tmp_path: Path) -> None:
    record, shape = (
        _film(tmp_path / "a.mkv", frames=20, rate_hz=8),
        LatentShape(frames=5, height=32, width=32),
    )
    plain, louder = (
        read_sound(tmp_path, record, shape, replace(FORM, loudness_lufs=target), fill_with_silence=False)
        for target in (None, -50.0)
    )
    assert abs(loudness_lufs(plain, sample_rate_hz=8000) + 50) > 1, "the file is not so by itself"
    # The gain is exact: one multiplication in fp32.
    assert loudness_lufs(louder, sample_rate_hz=8000) == pytest.approx(-50.0, abs=1e-4)
    torch.testing.assert_close(louder / louder.max(), plain / plain.max())


def test_latents_of_sound_are_counted_to_the_nearest() -> None:
    form = AudioForm(sample_rate_hz=44_100, channels=2, hop=2048)
    assert form.num_latents(17 / 24) == 15  # 31,237.5 / 2048 = 15.25
    assert form.num_latents(0.001) == 1
    # LTX-2: 25 latents a second, and its pipeline rounds seconds * 25.
    assert AudioForm(sample_rate_hz=16_000, channels=2, hop=640).num_latents(121 / 24) == round(121 / 24 * 25)


LTX2_AUDIO = {
    "base_channels": 8,
    "output_channels": 2,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "in_channels": 2,
    "resolution": 64,
    "latent_channels": 4,
    "sample_rate": 16_000,
    "mel_hop_length": 160,
    "mel_bins": 64,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("source", "model", "channels", "samples", "shape"),
    [
        ("AutoencoderOobleck", OOBLECK, 1, 32 * 50, (4, 50)),
        ("AutoencoderKLLTX2Audio", LTX2_AUDIO, 2, 640 * 4, (4, 4, 16)),
    ],
)
def test_every_audio_model_makes_as_many_latents_as_hops(
    source: str, model: dict[str, Any], channels: int, samples: int, shape: tuple[int, ...], precision: str
) -> None:
    config = AudioEncoderConfig.model_validate(
        {"model": {"source": source, "config": model}, "precision": precision}
    )
    encoder = AudioEncoder(config, seed=0, device=CPU)
    assert (encoder.form.sample_rate_hz, encoder.form.channels) == (16_000, channels)
    latent = encoder.encode(torch.rand(channels, samples, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert (tuple(latent.shape), latent.dtype) == (shape, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate_hz": 44_100}, r"audio\.sample_rate_hz: must be the model's, 16000, got 44100"),
        ({"channels": 2}, r"audio\.channels: must be the model's, 1, got 2"),
    ],
)
def test_a_rate_or_channels_that_the_model_does_not_take_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        AudioEncoder(AudioEncoderConfig.model_validate({**AUDIO, **changes}), seed=0, device=CPU)


def test_latents_that_are_not_finite_fail() -> None:
    config = VideoEncoderConfig(model=ModelConfig(source=TINY), precision="fp16")
    encoder = VideoEncoder(config, seed=0, device=CPU)
    with pytest.raises(DataError, match="its latents must be finite, got NaN or infinity"):
        encoder.encode(torch.full((3, 3, 16, 16), float("nan")))


# Normalisation


class Declaring(nn.Module):
    """A model that only has statistics."""

    def __init__(self, mean: list[float], std: list[float], **config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("latents_mean", torch.tensor(mean))
        self.register_buffer("latents_std", torch.tensor(std))


def test_latents_are_normalised_and_back() -> None:
    normalization = LatentNormalization(mean=(0.5, 0.0), std=(2.0, 1.0))
    latent = torch.tensor([4.5, 3.0]).reshape(1, 2, 1, 1, 1)
    assert normalization.normalize(latent).flatten().tolist() == [2.0, 3.0]
    assert torch.equal(normalization.denormalize(normalization.normalize(latent)), latent)
    assert LatentNormalization().normalize(latent).equal(latent)
    with pytest.raises(DataError, match="latent statistics: must have 3 channels as the latents have, got 2"):
        normalization.normalize(torch.zeros(1, 3, 4))


def test_statistics_of_mel_bands_are_laid_out_as_ltx2_packs_them() -> None:
    latent_BCTM = torch.randn(2, 3, 5, 4)
    mean, std = torch.randn(12), torch.rand(12) + 0.5
    packed_BTD = (
        latent_BCTM.transpose(1, 2).flatten(2, 3) - mean
    ) / std  # pipeline_ltx2.py, _pack_audio_latents, then normalise
    expected = packed_BTD.unflatten(2, (3, 4)).transpose(1, 2)
    found = LatentNormalization(mean=tuple(mean.tolist()), std=tuple(std.tolist())).normalize(latent_BCTM)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_statistics_come_from_the_model_then_its_export_then_nowhere(tmp_path: Path) -> None:
    exported = ModelConfig(source="M", pretrained=str(tmp_path))
    defaults = Declaring([0.0, 0.0], [1.0, 1.0])
    assert normalization_of(defaults, exported) == LatentNormalization()
    (tmp_path / "latent_statistics.json").write_text(
        json.dumps({"clips": 2, "latents_mean": [1, 2], "latents_std": [3, 4]})
    )
    assert normalization_of(defaults, exported) == LatentNormalization(mean=(1.0, 2.0), std=(3.0, 4.0))
    assert normalization_of(TinyVideoVAE(), exported) == LatentNormalization(mean=(1.0, 2.0), std=(3.0, 4.0))
    inside = ModelConfig(source="M", pretrained=str(tmp_path.parent), subfolder=tmp_path.name)
    assert normalization_of(defaults, inside) == LatentNormalization(mean=(1.0, 2.0), std=(3.0, 4.0))
    assert normalization_of(Declaring([5.0], [6.0]), exported) == LatentNormalization(mean=(5.0,), std=(6.0,))
    assert normalization_of(Declaring([5.0], [6.0], scaling_factor=2.0), exported) == LatentNormalization(
        mean=(5.0,), std=(3.0,)
    )
    (tmp_path / "latent_statistics.json").write_text('{"latents_mean": [1], "latents_std": [0]}')
    with pytest.raises(DataError, match="latents_std must be positive"):
        normalization_of(defaults, exported)


def test_encoders_normalise_by_the_statistics_of_their_model(tmp_path: Path) -> None:
    vae = build_model(ModelConfig(source="AutoencoderOobleck", config=OOBLECK), seed=0)
    vae.save_pretrained(tmp_path)
    config = AudioEncoderConfig.model_validate(
        {**AUDIO, "model": {"source": "AutoencoderOobleck", "pretrained": str(tmp_path)}}
    )
    wave = torch.rand(1, 640, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = AudioEncoder(config, seed=0, device=CPU).encode(wave)
    (tmp_path / "latent_statistics.json").write_text(
        json.dumps({"latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 4, 4]})
    )
    encoder = AudioEncoder(config, seed=0, device=CPU)
    found = encoder.encode(wave)
    mean, std = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[2.0], [2.0], [4.0], [4.0]])
    torch.testing.assert_close(found, (raw - mean) / std, rtol=0, atol=0)
    torch.testing.assert_close(
        encoder.normalization.denormalize(found[None])[0], raw, rtol=0, atol=1e-6
    )  # one rounding of numbers up to 4


def test_the_fingerprint_follows_weights_configuration_and_statistics(tmp_path: Path) -> None:
    found = {vae_fingerprint(ModelConfig(source=TINY), seed=seed) for seed in (0, 0, 1)}
    assert len(found) == 2
    vae = build_model(ModelConfig(source="AutoencoderOobleck", config=OOBLECK), seed=0)
    vae.save_pretrained(tmp_path)
    saved = ModelConfig(source="AutoencoderOobleck", pretrained=str(tmp_path))
    before = vae_fingerprint(saved, seed=0)
    assert before == vae_fingerprint(ModelConfig(source="AutoencoderOobleck", config=OOBLECK), seed=0)
    (tmp_path / "latent_statistics.json").write_text(
        json.dumps({"latents_mean": [1] * 4, "latents_std": [2] * 4})
    )
    assert vae_fingerprint(saved, seed=0) != before


# Tiles


LTX = tiny_ltx_vae(width=16, latent_channels=8, patch_size=4, scaling=(True, False, False))


def _tiling(**changes: Any) -> TilingConfig:
    return TilingConfig.model_validate({"tile": "64x64", "overlap": 16, "max_deviation": 10.0, **changes})


def _tiled(tiling: TilingConfig | None) -> VideoEncoder:
    model = ModelConfig(source="AutoencoderKLLTXVideo", config=LTX)
    return VideoEncoder(VideoEncoderConfig(model=model, precision="fp32", tiling=tiling), seed=0, device=CPU)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Nine frames of 112x112 pixels: two tiles both ways, three chunks."""
    from aiprod_ds.data.synthetic import SyntheticVideoDataset

    return SyntheticVideoDataset(1, 9, 112, 112)[0]


def test_tiles_change_latents_near_seams_and_less_the_more_they_overlap(film: Tensor) -> None:
    whole = _tiled(None).encode(film)
    deviations = []
    for overlap in (16, 32, 48):
        tiling = _tiling(overlap=overlap)
        encoder = _tiled(tiling)
        assert torch.equal(encoder.encode_whole(film), whole)
        deviations.append(check_tiles(film, tiling, whole=encoder.encode_whole, tiled=encoder.encode))
    assert 0 < deviations[2] < deviations[1] < deviations[0] < 1
    difference = (_tiled(_tiling()).encode(film) - whole).abs().mean(dim=(0, 1))
    assert difference[0, 0] < 0.1 * difference.max()  # the corner is the latent farthest from all seams


def test_chunks_keep_the_first_frame_and_change_what_follows(film: Tensor) -> None:
    whole, chunked = (
        _tiled(None).encode(film),
        _tiled(_tiling(tile="128x128", frames=4, overlap_frames=2)).encode(film),
    )
    assert chunked.shape == whole.shape
    torch.testing.assert_close(
        chunked[:, :3], whole[:, :3], rtol=0, atol=1e-5
    )  # the first chunk: 1 + 4 frames of a causal model
    assert (chunked[:, 3:] - whole[:, 3:]).abs().max() > 1e-3


def test_a_clip_that_fits_one_tile_is_encoded_whole(film: Tensor) -> None:
    small = film[:, :, :64, :64]
    assert torch.equal(_tiled(_tiling()).encode(small), _tiled(None).encode(small))


def test_a_deviation_above_the_allowed_one_stops_the_run(film: Tensor) -> None:
    tiling = _tiling(max_deviation=1e-4)
    encoder = _tiled(tiling)
    with pytest.raises(
        ConfigError,
        match=r"video\.tiling: may change latents by 0\.0001 of their standard deviation, got 0\.\d+",
    ):
        check_tiles(film, tiling, whole=encoder.encode_whole, tiled=encoder.encode)
    with pytest.raises(
        ConfigError, match=r"must give latents of .*as whole encoding does, got .*own tiling is broken"
    ):
        check_tiles(film, tiling, whole=encoder.encode_whole, tiled=lambda part: encoder.encode(part)[:, :1])
    # Worked number: latents of standard deviation 1 that are off by 0.05 deviate by 0.05.
    latents = torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    off = check_tiles(film, _tiling(), whole=lambda _: latents, tiled=lambda _: latents + 0.05)
    assert off == pytest.approx(0.05, rel=0.02)  # the sample's own deviation is 1 within 1 / sqrt(2 * 30,000)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (TINY, {}, r"video\.tiling: has no effect for TinyVideoVAE, which cannot encode in tiles"),
        (TINY, {"overlap": 6}, r"video\.tiling\.overlap: must be a multiple of the model's stride 4, got 6"),
        (
            TINY,
            {"frames": 5, "overlap_frames": 2},
            r"video\.tiling\.frames: must be a multiple of the model's stride 2, got 5",
        ),
    ],
)
def test_tiles_that_a_model_cannot_have_are_refused(
    source: str, changes: dict[str, Any], message: str
) -> None:
    config = VideoEncoderConfig(model=ModelConfig(source=source), precision="fp32", tiling=_tiling(**changes))
    with pytest.raises(ConfigError, match=message):
        VideoEncoder(config, seed=0, device=CPU)


def test_a_run_checks_its_tiles_first(media: Path, caplog: pytest.LogCaptureFixture) -> None:
    video = {"model": {"source": "AutoencoderKLLTXVideo", "config": LTX}, "precision": "fp32"}
    shapes = [{"resolution": "32x48", "duration": {"frames": 5}}]

    def run(**tiling: Any) -> EncodeSummary:
        tiles = {"tile": "32x32", "overlap": 16, **tiling}
        return run_encoding(_config(media, video={**video, "tiling": tiles}, shapes=shapes))

    with pytest.raises(ConfigError, match=r"video\.tiling: may change latents by 0\.001"):
        run(max_deviation=0.001)
    with caplog.at_level(logging.INFO):
        assert run(max_deviation=5.0).written[LATENTS] == 3
    assert "tiles against whole encoding: deviation=" in caplog.text
