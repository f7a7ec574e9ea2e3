"""Held-out measures of two ranks, one of which has fewer clips: the same as of one process, with the names of
what was left out in the order of the clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.metrics.audio_quality import AudioQuality
from aiprod_ds.metrics.quality import VideoQuality
from aiprod_ds.metrics.video_features import VideoFeatures
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.trainers.measures import judged

pytestmark = pytest.mark.dist

NAMES = ("c.mp4", "a.mp4", "b.mp4", "still.mp4", "e.mp4")
SOUNDS = ("speech.wav", "silent.wav", "music.wav")


class ColourFeatures(nn.Module):
    """Six features of a video."""

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        flat_BCN = video_BCTHW.flatten(2)
        return torch.cat([flat_BCN.mean(2), flat_BCN.std(2)], dim=1)


def _quality() -> VideoQuality:
    features = VideoFeatures(ColourFeatures(), size=16, num_frames=3, where="test")
    return VideoQuality(lambda x, y: (x - y).abs().mean(), features=features)


def _clips(place: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(place)
    x, noise = (torch.rand(1, 3, 3, 16, 16, generator=generator) - 0.5 for _ in range(2))
    x = x if NAMES[place] != "still.mp4" else x[:, :, :1].expand_as(x)
    return x, x + 0.3 * noise


def _sounds(place: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(place)
    x, noise = (torch.rand(1, 1, 4096, generator=generator) - 0.5 for _ in range(2))
    x = torch.zeros_like(x) if SOUNDS[place] == "silent.wav" else x
    return x, x + 0.1 * noise


def _found(rank: int, world_size: int) -> dict[str, Any]:
    """Measures every `world_size`th clip from `rank` on, as evaluation spreads them."""
    engine = cast("Engine", SimpleNamespace(device=torch.device("cpu"), world_size=world_size))
    quality, sound = _quality(), AudioQuality(sample_rate_hz=16000)
    for place in range(rank, len(NAMES), world_size):
        quality.update(*_clips(place), names=[NAMES[place]])
    for place in range(rank, len(SOUNDS), world_size):
        sound.update(*_sounds(place), names=[SOUNDS[place]])
    video, video_left_out = judged(engine, quality, _quality(), clips=NAMES)
    audio, audio_left_out = judged(engine, sound, AudioQuality(sample_rate_hz=16000), clips=SOUNDS)
    left_out = [[entry.clip, entry.measure, entry.reason] for entry in (*video_left_out, *audio_left_out)]
    return {"video": video, "audio": audio, "left_out": left_out}


def measured() -> dict[str, Any]:
    return _found(dist.rank(), dist.world_size())


def test_two_ranks_measure_what_one_process_does() -> None:
    alone = _found(0, 1)
    ranks = run_on_ranks(measured, ranks=2)

    assert ranks[0] == ranks[1]
    assert set(alone["video"]) == {"psnr_db", "ssim", "lpips_vgg", "rfvd", "flicker_error", "flicker_ratio"}
    assert ranks[0]["left_out"] == alone["left_out"]
    assert [entry[0] for entry in alone["left_out"]] == ["still.mp4", *["silent.wav"] * 3]
    for kind in ("video", "audio"):
        # float64 sums in another order; rFVD is a difference of nearby numbers.
        assert ranks[0][kind] == pytest.approx(alone[kind], rel=1e-9)
