"""The Fréchet distance of two sets of features: rFVD, where they are those of clips and reconstructions.

Owns the sums from which means and covariances follow, and the distance; the network is `video_features.py`.
Called by `quality.py`. Shapes: B batch, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiprod_ds.metrics.video_features import VideoFeatures


class FrechetDistance:
    """Accumulates features of originals and reconstructions; states of several ranks add up.

        rfvd = |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

    with means m and covariances C (divisor n - 1) over clips, in float64. What is kept of n clips is n, the
    sums of f and those of f f^T, so ranks add as one process does.

    The distance of two finite samples is biased upwards, the more so the fewer clips there are; figures
    compare at the same number of the same clips.

    Source: Unterthiner et al. 2018 (FVD); Heusel et al. 2017, equation 6.

    Args:
        features: What makes [B,F] of videos.
    """

    def __init__(self, features: VideoFeatures) -> None:
        self._features = features
        size = features.num_features
        self._count = 0.0
        self._sums_2F = torch.zeros(2, size, dtype=torch.float64)
        self._squares_2FF = torch.zeros(2, size, size, dtype=torch.float64)

    def state(self) -> Tensor:
        """Returns the sums so far, 1-D float64 on the CPU: 1 + 2 F + 2 F^2 numbers."""
        count = torch.tensor([self._count], dtype=torch.float64)
        return torch.cat([count, self._sums_2F.flatten(), self._squares_2FF.flatten()])

    def merge(self, state: Tensor) -> None:
        """Adds the `state()` of another accumulator."""
        sizes = [1, self._sums_2F.numel(), self._squares_2FF.numel()]
        count, sums, squares = torch.split(state.to(self._sums_2F), sizes)
        self._count += float(count)
        self._sums_2F += sums.view_as(self._sums_2F)
        self._squares_2FF += squares.view_as(self._squares_2FF)

    def update(self, original_BCTHW: Tensor, reconstruction_BCTHW: Tensor) -> None:
        """Adds a batch of clips, [B,3,T,H,W] in [-1,1] both; the network runs on the device they are on."""
        for side, video_BCTHW in enumerate((original_BCTHW, reconstruction_BCTHW)):
            features_BF = self._features(video_BCTHW)
            self._sums_2F[side] += features_BF.sum(0)
            self._squares_2FF[side] += features_BF.T @ features_BF
        self._count += len(original_BCTHW)

    def compute(self) -> dict[str, float]:
        """Returns `rfvd`; nothing for fewer than two clips, which have no covariance."""
        if self._count < 2:
            return {}
        means_2F = self._sums_2F / self._count
        outer_2FF = means_2F.unsqueeze(2) * means_2F.unsqueeze(1)
        covariances_2FF = (self._squares_2FF - self._count * outer_2FF) / (self._count - 1)
        return {"rfvd": frechet_distance(means_2F, covariances_2FF)}


def frechet_distance(means_2F: Tensor, covariances_2FF: Tensor) -> float:
    """Returns the squared Fréchet distance of two Gaussians; NaN where something is not finite.

    tr (C_x C_y)^(1/2) is the sum of the singular values of C_x^(1/2) C_y^(1/2): symmetric eigenvalues and
    singular values exist for every covariance, while the root of the product of two singular ones, as those
    of few clips are, often does not converge.

    Worked number: N(0, 1) and N(1, 4) have 1 + (1 + 4 - 2 * 2) = 2.

    Args:
        means_2F: Of both, float64.
        covariances_2FF: Of both, symmetric.
    """
    if not (means_2F.isfinite().all() and covariances_2FF.isfinite().all()):
        return float("nan")
    x_FF, y_FF = (_root(covariance_FF) for covariance_FF in covariances_2FF)
    shared = torch.linalg.svdvals(x_FF @ y_FF).sum()
    traces = covariances_2FF.diagonal(dim1=1, dim2=2).sum()
    distance = (means_2F[0] - means_2F[1]).square().sum() + traces - 2 * shared
    return max(float(distance), 0.0)  # of equal ones rounding may leave less than nothing


def _root(covariance_FF: Tensor) -> Tensor:
    values_F, vectors_FF = torch.linalg.eigh(covariance_FF)
    root_FF: Tensor = (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
    return root_FF
