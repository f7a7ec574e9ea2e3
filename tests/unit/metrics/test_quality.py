"""VideoQuality: closed forms, the mean over clips, merging over ranks."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.quality import VideoQuality


def _clips(batch=3, frames=3, size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, frames, size, size, generator=generator) - 0.5
    return x, (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def _measured(*pairs, **kwargs):
    quality = VideoQuality(**kwargs)
    for original, reconstruction in pairs:
        quality.update(original, reconstruction)
    return quality


def test_worked_number_of_the_docstring():
    x, _ = _clips()
    result = _measured((x, x + 0.2)).compute()

    # fp32 mean of squares of numbers near 0.1.
    assert result["psnr_db"] == pytest.approx(20.0, abs=1e-4)
    assert result["flicker_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_an_exact_copy_has_the_ceiling_and_full_similarity():
    x, _ = _clips()
    assert _measured((x, x)).compute() == {
        "psnr_db": 100.0,
        "ssim": pytest.approx(1.0, abs=1e-6),
        "flicker_error": 0.0,
        "flicker_ratio": pytest.approx(1.0),
    }


def test_psnr_is_the_mean_of_the_clips_not_of_their_errors():
    x, _ = _clips(batch=1)
    result = _measured((x, x + 0.2), (x, x + 0.02)).compute()

    assert result["psnr_db"] == pytest.approx((20 + 40) / 2, abs=1e-3)


def test_ssim_agrees_with_its_definition_in_numpy():
    x, y = _clips(batch=1, frames=1, size=24)
    expected = np.mean(
        [_ssim(a, b) for a, b in zip(x[0, :, 0].numpy() / 2 + 0.5, y[0, :, 0].numpy() / 2 + 0.5, strict=True)]
    )

    # Same window and mirrored borders. fp32 against fp64 variances (differences of nearby numbers).
    assert _measured((x, y)).compute()["ssim"] == pytest.approx(expected, abs=1e-4)


def test_values_beyond_the_range_are_clipped_in_the_reconstruction():
    white = torch.ones(1, 3, 1, 16, 16)

    assert _measured((white, white * 1.5)).compute()["psnr_db"] == 100.0


def test_flicker_doubles_when_motion_doubles():
    x, _ = _clips()
    assert _measured((x * 0.4, x * 0.8)).compute()["flicker_ratio"] == pytest.approx(2.0, rel=1e-5)


def test_flicker_error_is_the_mean_of_what_is_added_between_frames():
    x, _ = _clips(frames=5)
    flickering = x.clone()
    flickering[:, :, 1::2] += 0.2

    # Every change between frames is 0.1 off on [0,1]; fp32 differences of numbers below 1.
    assert _measured((x, flickering)).compute()["flicker_error"] == pytest.approx(0.1, abs=1e-6)
    assert _measured((x, x + 0.2)).compute()["flicker_error"] == pytest.approx(0.0, abs=1e-6)


def test_flicker_error_agrees_with_numpy():
    x, y = _clips(frames=4)
    a, b = (np.diff(clip.numpy().astype(np.float64) / 2 + 0.5, axis=2) for clip in (x, y))

    # fp32 against fp64 means of differences near 0.1.
    assert _measured((x, y)).compute()["flicker_error"] == pytest.approx(np.abs(b - a).mean(), rel=1e-5)


def test_the_ratio_may_hide_flicker_that_the_error_shows():
    """Motion replaced by as much flicker."""
    x = torch.zeros(1, 3, 5, 16, 16)
    x[:, :, 1::2] = 0.2
    y = torch.zeros_like(x)
    y[:, :, ::2] = 0.2
    found = _measured((x, y)).compute()

    assert found["flicker_ratio"] == pytest.approx(1.0)
    assert found["flicker_error"] == pytest.approx(0.2)


def test_clips_that_cannot_be_judged_are_named_and_left_out():
    x, y = _clips(batch=1, frames=3)
    still, small = torch.zeros_like(x), x[..., :8, :8]
    quality = VideoQuality()
    quality.update(x, y, names=["moving.mp4"])
    quality.update(still, still + 0.1, names=["still.mp4"])
    quality.update(x[:, :, :1], y[:, :, :1], names=["image.png"])
    quality.update(small, small, names=["small.mp4"])
    found = quality.compute()

    assert [(entry.clip, entry.measure, entry.reason) for entry in quality.not_judged] == [
        ("still.mp4", "flicker_ratio", "the original does not move"),
        ("image.png", "flicker_ratio", "one frame"),
        ("image.png", "flicker_error", "one frame"),
        ("small.mp4", "ssim", "smaller than 11x11"),
    ]
    ssims = [_measured(pair).compute()["ssim"] for pair in _pairs(x, y, still)]
    # fp64 means.
    assert found["ssim"] == pytest.approx(sum(ssims) / 3, rel=1e-12)
    alone = _measured((x, y), (small, small)).compute()
    assert found["flicker_ratio"] == pytest.approx(alone["flicker_ratio"], rel=1e-12)


def test_a_measure_that_judged_no_clip_is_absent():
    still = torch.zeros(1, 3, 1, 8, 8)
    assert set(_measured((still, still + 0.1)).compute()) == {"psnr_db"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_and_is_not_left_out(value):
    x, y = _clips(frames=3)
    y[0, 0, 1, 2, 3] = value
    quality = VideoQuality(lambda a, b: (a - b).abs().mean())
    quality.update(x, y)

    assert quality.not_judged == ()
    assert all(math.isnan(found) for found in quality.compute().values())


def test_merged_ranks_equal_one_process():
    x, y = _clips(batch=3)
    whole = _measured((x, y)).compute()
    rank_states = [_measured((x[:1], y[:1])).state(), _measured((x[1:], y[1:])).state()]
    merged = VideoQuality()
    merged.merge(torch.stack(rank_states).sum(dim=0))

    # fp64 sums in another order.
    assert merged.compute() == pytest.approx(whole, rel=1e-12)


def test_a_rank_without_clips_merges_as_nothing():
    x, y = _clips()
    quality = _measured((x, y))
    before = quality.compute()
    quality.merge(VideoQuality().state())

    assert quality.compute() == before


def test_lpips_is_averaged_over_clips_when_a_network_is_given():
    x, y = _clips()
    result = _measured((x, y), lpips=lambda a, b: (a - b).abs().mean()).compute()

    # fp32 means.
    assert result["lpips_vgg"] == pytest.approx((x - y).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_clips_are_measured_in_fp32(dtype):
    x, y = (clip.to(dtype) for clip in _clips())

    assert _measured((x, y)).compute() == _measured((x.float(), y.float())).compute()


def test_no_clips_and_wrong_shapes_are_errors():
    with pytest.raises(DataError, match="needs at least one clip"):
        VideoQuality().compute()
    with pytest.raises(DataError, match="must have one shape"):
        VideoQuality().update(torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 2, 16, 16))
    with pytest.raises(DataError, match=r"one shape \[B,3,T,H,W\]"):
        VideoQuality().update(torch.zeros(3, 1, 16, 16), torch.zeros(3, 1, 16, 16))


def _pairs(x, y, still):
    return (x, y), (still, still + 0.1), (x[:, :, :1], y[:, :, :1])


def _ssim(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    blur = lambda image: gaussian_filter(image, 1.5, truncate=5 / 1.5, mode="mirror")  # noqa: E731 (11 taps)
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y, covariance = (
        blur(x * x) - mean_x**2,
        blur(y * y) - mean_y**2,
        blur(x * y) - mean_x * mean_y,
    )
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    assert math.isfinite(similarity.sum())
    return similarity.mean()
