# ruff: noqa: E501  messages stand on one line, as users see them
"""Plans whose clips are sounds, and lengths in seconds: frames, rates, tokens, words and the terminal page."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.data_rules import ClipFacts, check_data, data_notes
from aiprod_ds.curriculum.describe import describe, learning_rate_curve, totals
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run, snap_notes
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.report.plan_view import PlanView

HOP = ModelStrides(spatial=1, temporal=2048, is_causal=False)
FRAMES = ModelStrides(spatial=32, temporal=8)


def _values(*phases: dict[str, Any], **curriculum: Any) -> dict[str, Any]:
    full = [
        {"name": f"p{n}", "global_batch_size": 4, "updates": 10, "learning_rate": 1e-3, **p}
        for n, p in enumerate(phases)
    ]
    return {
        "output_dir": "o",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": full, **curriculum},
    }


def _sound(*phases: dict[str, Any], **curriculum: Any) -> RunPlan:
    config = AudioVAETrainerConfig.model_validate(_values(*phases, **curriculum))
    return plan_run(config, world_size=1, strides=HOP, source="c.yaml")


def _clip(name: str, samples: int) -> ClipFacts:
    return ClipFacts(name=name, frames=samples, seconds=samples / 44_100, height=1, width=1)


@pytest.mark.parametrize(
    ("duration", "requested", "used", "words"),
    [
        ({"seconds": 1.5}, 66_150, 67_584, "67,584 samples (1.53 s), batch 4"),
        ({"frames": 65_536}, 65_536, 65_536, "65,536 samples (1.49 s), batch 4"),
        ({"seconds": 1e-6}, 1, 2_048, "2,048 samples (0.05 s), batch 4"),
    ],
)
def test_samples_are_snapped_to_the_hop(
    duration: dict[str, Any], requested: int, used: int, words: str
) -> None:
    plan = _sound({"duration": duration})
    (bucket,) = plan.phases[0].buckets
    assert (bucket.requested_frames, bucket.frames, bucket.frame_rate_hz) == (requested, used, 44_100)
    assert (bucket.height, bucket.width, bucket.shape_text) == (1, 1, words)
    notes = (
        ()
        if requested == used
        else (f"phase p0: samples {requested:,} -> {used:,} (the model takes 2048 * k samples)",)
    )
    assert snap_notes(plan, HOP) == notes


def test_strict_lengths_name_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        _sound({"duration": {"seconds": 1.5}}, {"duration": {"frames": 100}}, frames_policy="strict")
    assert str(caught.value).splitlines() == [
        "c.yaml: curriculum.phases[0].duration.seconds: must give 2048 * k samples for this model (frames_policy: strict), got 66150. Use 65536 or 67584, or frames_policy: snap.",
        "c.yaml: curriculum.phases[1].duration.frames: must give 2048 * k samples for this model (frames_policy: strict), got 100. Use 2048, or frames_policy: snap.",
    ]


def test_latents_of_sound_are_samples_over_the_hop() -> None:
    assert (HOP.latents(67_584), FRAMES.latents(17)) == (33, 3)
    (row,) = describe(_sound({"duration": {"seconds": 1.5}}), strides=HOP)
    assert (row["latent_tokens_per_update"], row["pixels_per_update"]) == (4 * 33, 4 * 67_584)


def test_video_takes_seconds_where_the_rate_is_given() -> None:
    duration = {"seconds": 2.0, "frame_rate_hz": 12.0}
    config = VAETrainerConfig.model_validate(_values({"resolution": "64x64", "duration": duration}))
    (bucket,) = plan_run(config, world_size=1, strides=FRAMES).phases[0].buckets
    assert (bucket.requested_frames, bucket.frames, bucket.frame_rate_hz) == (24, 25, 12.0)


def test_video_refuses_seconds_without_a_rate() -> None:
    config = VAETrainerConfig.model_validate(_values({"resolution": "64x64", "duration": {"seconds": 2.0}}))
    with pytest.raises(
        PlanError,
        match=r"duration.seconds: needs a rate for video, got 2 without one. Add frame_rate_hz or write",
    ):
        plan_run(config, world_size=1, strides=FRAMES)


def test_video_needs_a_resolution_in_phases_and_in_buckets() -> None:
    buckets = [{"resolution": "64x64", "duration": {"frames": 1}}, {"duration": {"frames": 9}}]
    with pytest.raises(ConfigError, match="resolution") as caught:
        VAETrainerConfig.model_validate(_values({"duration": {"frames": 9}}, {"buckets": buckets}))
    assert "curriculum.phases[0].resolution: must be given for video, got nothing. Add `resolution:`." in str(
        caught.value
    )
    assert "curriculum.phases[1].buckets[1].resolution: must be given for video, got nothing." in str(
        caught.value
    )


def test_short_sounds_are_listed_with_the_length_that_they_lack() -> None:
    plan = _sound({"duration": {"frames": 65_536}})
    clips = [_clip("a.wav", 70_000), _clip("b.wav", 65_535)]
    (short,) = check_data(plan, clips, [[(0,)]])
    assert (short.length, short.names) == ("65,536 samples (1.49 s)", ("b.wav",))
    with pytest.raises(
        PlanError,
        match=r"duration: must be at most the samples of the longest clip at 44100 Hz \(65535, b.wav\), got 65536",
    ):
        check_data(plan, clips[1:], [[()]], "c.yaml")


def test_sounds_are_neither_small_nor_slow() -> None:
    plan = _sound({"duration": {"frames": 2048}})
    clips = [_clip(f"{number}.wav", 5_000 + number) for number in range(4)]
    assert data_notes(plan, clips, [[(0, 1, 2, 3)]]) == ()


def test_the_page_speaks_of_samples() -> None:
    config = AudioVAETrainerConfig.model_validate(
        _values({"duration": {"seconds": 1.5}}, {"duration": {"frames": 131_072}})
    )
    plan = plan_run(config, world_size=1, strides=HOP)
    rows, curve = describe(plan, config=config), learning_rate_curve(plan, 50)
    page = PlanView(
        source="c.yaml", model="M", parameters=1, world_size=1, rows=rows, totals=totals(plan), curve=curve
    )
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(page)
    text = capture.get()
    for words in (
        "66,150 -> 67,584",
        "131,072 (2.97 s)",
        "sample rate",
        "samples/update",
        "20 updates; 80 clips; 7.95 M samples",
    ):
        assert words in text
    assert "size" not in text
    assert "pixels" not in text
