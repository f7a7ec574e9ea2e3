"""FrechetDistance: closed forms, scipy's root of a matrix, torchmetrics, merging over ranks, few clips."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from aiprod_ds.metrics.frechet import FrechetDistance, frechet_distance
from aiprod_ds.metrics.quality import VideoQuality
from aiprod_ds.metrics.video_features import VideoFeatures


class Statistics(torch.nn.Module):
    """Six features of a video: mean and spread of each colour."""

    def forward(self, video_BCTHW):
        flat_BCN = video_BCTHW.flatten(2)
        return torch.cat([flat_BCN.mean(2), flat_BCN.std(2)], dim=1)


def _features():
    return VideoFeatures(Statistics(), size=8, num_frames=3, where="test")


def _videos(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(count, 3, 1, 1, 1, generator=generator) - 0.5
    x = (levels + 0.3 * torch.randn(count, 3, 3, 8, 8, generator=generator)).clamp(-1, 1)
    return x, (x * 0.8 + 0.1 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def _distance(x, y):
    distance = FrechetDistance(_features())
    distance.update(x, y)
    return distance


def _gaussian(samples):
    return samples.mean(0), np.cov(samples, rowvar=False)


def test_worked_number_of_the_docstring():
    means, covariances = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[[1.0]], [[4.0]]]).double()
    assert frechet_distance(means, covariances) == pytest.approx(2.0, rel=1e-14)


def test_diagonal_covariances_have_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 5, generator=generator).double()
    variances = torch.rand(2, 5, generator=generator).double()
    expected = (means[0] - means[1]).square().sum() + (
        variances[0].sqrt() - variances[1].sqrt()
    ).square().sum()

    assert frechet_distance(means, torch.diag_embed(variances)) == pytest.approx(expected.item(), rel=1e-12)


def test_full_covariances_agree_with_scipys_root():
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal((50, 6)) @ generator.standard_normal((6, 6)) for _ in range(2))
    (mean_x, covariance_x), (mean_y, covariance_y) = _gaussian(x), _gaussian(y)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(covariance_x + covariance_y - 2 * root)
    means, covariances = np.stack([mean_x, mean_y]), np.stack([covariance_x, covariance_y])

    found = frechet_distance(torch.from_numpy(means), torch.from_numpy(covariances))
    # Both in float64; sqrtm of the product loses about half of its digits.
    assert found == pytest.approx(expected, rel=1e-7)


def test_features_of_clips_agree_with_numpy_and_scipy():
    x, y = _videos(20)
    rows = [Statistics()(video).double().numpy() for video in (x, y)]
    (mean_x, covariance_x), (mean_y, covariance_y) = map(_gaussian, rows)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(covariance_x + covariance_y - 2 * root)

    # Covariances from sums of squares: float64 loses a few digits to means that exceed the spread.
    assert _distance(x, y).compute()["rfvd"] == pytest.approx(expected, rel=1e-6)


def test_agrees_with_the_distance_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 8, generator=generator).double() * scale for scale in (1.0, 1.5))
    means, covariances = torch.stack([x.mean(0), y.mean(0)]), torch.stack([x.T.cov(), y.T.cov()])
    expected = _compute_fid(means[0], covariances[0], means[1], covariances[1]).item()

    # Theirs takes eigenvalues of the product, ours singular values.
    assert frechet_distance(means, covariances) == pytest.approx(expected, rel=1e-9)


def test_fewer_clips_than_features_have_a_distance():
    """Singular covariances, of which the root of the product need not converge."""
    x, y = _videos(3)
    assert 0 < _distance(x, y).compute()["rfvd"] < 10


def test_an_exact_copy_is_at_distance_zero():
    x, _ = _videos(12)
    # Rounding of sums of squares near 1.
    assert _distance(x, x).compute()["rfvd"] == pytest.approx(0.0, abs=1e-12)


def test_merged_ranks_equal_one_process():
    x, y = _videos(7)
    whole = _distance(x, y)
    merged = FrechetDistance(_features())
    merged.merge(_distance(x[:3], y[:3]).state() + _distance(x[3:], y[3:]).state())

    # float64 sums in another order, then a difference of nearby numbers.
    assert merged.compute()["rfvd"] == pytest.approx(whole.compute()["rfvd"], rel=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_clips_have_none(count):
    x, y = _videos(1)
    distance = FrechetDistance(_features())
    if count:
        distance.update(x, y)
    assert distance.compute() == {}


def test_nan_features_show():
    x, y = _videos(4)
    y[2] = math.nan
    assert math.isnan(_distance(x, y).compute()["rfvd"])


def test_video_quality_measures_it_beside_the_others_and_merges_both():
    x, y = (torch.nn.functional.interpolate(clip, scale_factor=(1, 2, 2)) for clip in _videos(5))
    whole, merged = (VideoQuality(features=_features()) for _ in range(2))
    whole.update(x, y)
    parts = [VideoQuality(features=_features()) for _ in range(3)]  # one rank without a clip
    parts[0].update(x[:2], y[:2])
    parts[1].update(x[2:], y[2:])
    merged.merge(sum(part.state() for part in parts))

    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-9)
    assert whole.compute()["rfvd"] == pytest.approx(_distance(x, y).compute()["rfvd"], rel=1e-9)
