"""What discriminators take and give, what a logit sees, and that judging frozen touches no parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.losses import (
    AudioAdversarialConfig,
    PatchDiscriminatorConfig,
    PeriodDiscriminatorConfig,
    STFTDiscriminatorConfig,
    VideoAdversarialConfig,
)
from aiprod_ds.models.discriminators.judgement import (
    Discriminators,
    audio_discriminators,
    judged_by_frozen,
    video_discriminators,
)
from aiprod_ds.models.discriminators.patch import FrameDiscriminator, VideoPatchDiscriminator, smallest_side
from aiprod_ds.models.discriminators.period import PeriodDiscriminator
from aiprod_ds.models.discriminators.spectrum import SpectrumDiscriminator

SMALL = PatchDiscriminatorConfig(channels=4, layers=2)


def _video() -> Discriminators:
    torch.manual_seed(0)
    return video_discriminators(VideoAdversarialConfig(patch_3d=SMALL, frame_2d=SMALL))


def _audio(channels: int = 2) -> Discriminators:
    torch.manual_seed(0)
    config = AudioAdversarialConfig(
        stft=STFTDiscriminatorConfig(fft_sizes=(64, 32), channels=4),
        period=PeriodDiscriminatorConfig(periods=(2, 3), channels=2),
    )
    return audio_discriminators(config, channels=channels)


def test_there_is_one_judgement_for_each_that_is_asked_for() -> None:
    video, audio = _video(), _audio()
    assert list(video.members) == ["patch_3d", "frame_2d"]
    assert list(audio.members) == ["stft_64", "stft_32", "period_2", "period_3"]
    assert len(video(torch.randn(2, 3, 5, 16, 16))) == 2
    assert len(audio(torch.randn(2, 2, 200))) == 4


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_patches_of_space_and_time(frames: int) -> None:
    """Two layers of stride 2 in space; the second halves the frames, rounded up."""
    logits, features = VideoPatchDiscriminator(SMALL)(torch.randn(2, 3, frames, 16, 24))
    assert logits.shape == (2, 1, -(-frames // 2), 4, 6)
    assert [feature.shape[1] for feature in features] == [4, 8, 16]


def test_patches_of_frames_do_not_know_each_other() -> None:
    member, video = FrameDiscriminator(SMALL), torch.randn(2, 3, 5, 16, 16)
    logits, features = member(video)
    assert logits.shape == (2, 5, 4, 4)
    assert [len(feature) for feature in features] == [2, 2, 2]
    changed = video.clone()
    changed[:, :, 3] += 1.0
    is_same = (member(changed)[0] == logits).flatten(2).all(dim=2)
    assert is_same.tolist() == [[True, True, True, False, True]] * 2


def test_the_smallest_frame_has_a_logit_and_a_smaller_one_has_none() -> None:
    for layers in (1, 2, 3):
        config = PatchDiscriminatorConfig(channels=2, layers=layers)
        side = smallest_side(config)
        assert VideoPatchDiscriminator(config)(torch.randn(1, 3, 1, side, side))[0].numel() == 1
        with pytest.raises(RuntimeError, match=r"size|Kernel"):
            VideoPatchDiscriminator(config)(torch.randn(1, 3, 1, side // 2, side // 2))


def test_a_logit_of_the_default_sees_54_pixels_of_25_frames() -> None:
    """Without norms, which see all of a clip, a change reaches the logits that see it and no others."""
    member = VideoPatchDiscriminator(PatchDiscriminatorConfig(channels=1))
    for layer in member.body:
        assert isinstance(layer, nn.Sequential)
        layer[1] = nn.Identity()
    for value in member.parameters():
        nn.init.ones_(value)
    video = torch.ones(1, 3, 57, 128, 128, requires_grad=True)
    logits = member(video)[0]
    (seen,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, 8, 8], video)
    extents = [int((seen != 0).flatten(0, 1).any(dim=0).sum(dim=axis).amax()) for axis in (0, 1, 2)]
    assert extents == [25, 54, 54]


@pytest.mark.parametrize("samples", [200, 40])  # shorter than a window, too
def test_patches_of_a_spectrogram(samples: int) -> None:
    logits, features = SpectrumDiscriminator(2, fft_size=64, width=4)(torch.randn(3, 2, samples))
    assert logits.shape == (3, 1, 1 + samples // 16, 5)  # 33 frequencies halved three times
    assert len(features) == 5


def test_the_spectrum_of_a_sine_has_one_peak_of_known_height() -> None:
    """A sine at the centre of bin 8 with amplitude 1: |X| = sum(window) / 2, over the window's norm."""
    member = SpectrumDiscriminator(1, fft_size=64, width=4)
    wave = torch.sin(2 * torch.pi * 8 / 64 * torch.arange(640, dtype=torch.float64)).view(1, 1, -1)
    parts = member._spectrum(wave)[0, :, 20]  # a frame in the middle: real and imaginary
    window = torch.hann_window(64, dtype=torch.float64)
    height = parts.norm(dim=0)
    assert int(height.argmax()) == 8
    assert float(height[8]) == pytest.approx(float(window.sum() / 2 / window.norm()), rel=1e-9)


def test_samples_that_are_no_period_apart_do_not_know_each_other() -> None:
    member, wave = PeriodDiscriminator(1, period=3, width=2), torch.randn(1, 1, 81)
    logits = member(wave)[0]
    changed = wave.clone()
    changed[..., 1::3] += 1.0
    is_same = (member(changed)[0] == logits).all(dim=2).flatten()
    assert is_same.tolist() == [True, False, True]


def test_the_end_of_a_clip_is_reflected() -> None:
    member, wave = PeriodDiscriminator(1, period=4, width=2), torch.randn(1, 1, 78)
    mirrored = torch.cat([wave, wave[..., -3:-1].flip(-1)], dim=-1)
    assert torch.equal(member(wave)[0], member(mirrored)[0])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_judging_frozen_gives_gradients_to_clips_alone(kind: str) -> None:
    network, clips = (
        (_video(), torch.randn(2, 3, 5, 16, 16)) if kind == "video" else (_audio(), torch.randn(2, 2, 200))
    )
    clips.requires_grad_()
    plain = network(clips)
    frozen = judged_by_frozen(network, clips)
    for one, other in zip(plain, frozen, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert len(one.features) == len(other.features)
    sum(judgement.logits.sum() for judgement in frozen).backward()
    assert all(value.grad is None and value.requires_grad for value in network.parameters())
    assert clips.grad is not None
    assert float(clips.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_bf16_computes_what_fp32_does_within_its_digits(kind: str) -> None:
    """8 bits, through five layers; measured 0.5 % of the largest logit."""
    network, clips = (
        (_video(), torch.randn(2, 3, 5, 16, 16)) if kind == "video" else (_audio(), torch.randn(2, 2, 200))
    )
    for exact, rounded in zip(network(clips), copy.deepcopy(network).bfloat16()(clips), strict=True):
        assert rounded.logits.dtype == torch.float32
        assert _distance(exact.logits, rounded.logits) < 0.05


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / one.detach().abs().max())
