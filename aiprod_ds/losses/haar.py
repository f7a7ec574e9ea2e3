"""L1 distance between one-level 3-D Haar sub-bands: weighs edges and motion apart from flat colour.

Owns the transform and the distance. Called by `video.py`. Shapes: B batch, C channels, T frames, H height, W
width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from aiprod_ds.losses.precision import no_autocast, widened

_AXES = (2, 3, 4)


def haar_l1(reconstruction_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Returns the mean absolute difference over the eight sub-bands.

        L = mean|Haar(x - y)|   (the transform is linear, so one transform of the difference is enough)

    Worked number: a constant difference d lands in the low-pass band alone as 2*sqrt(2)*d, so L =
    2*sqrt(2)*d/8 = 0.353553*d.

    Args:
        reconstruction_BCTHW: [B,C,T,H,W], any float type and range.
        target_BCTHW: Same shape.

    Returns:
        0-dim fp32 (fp64 for fp64 inputs).

    Source: WF-VAE (Li et al. 2024), the wavelet transform of section 3.1. Deviations: taken between input and
    output instead of inside the network, and only an odd axis is padded (see `haar_bands`).
    """
    with no_autocast(reconstruction_BCTHW):
        return haar_bands(widened(reconstruction_BCTHW) - widened(target_BCTHW)).abs().mean()


def haar_bands(video_BCTHW: Tensor) -> Tensor:
    """Returns the orthonormal one-level 3-D Haar transform, [8, B, C, ceil(T/2), ceil(H/2), ceil(W/2)],
    low-pass band first.

    An odd T repeats the first frame (causal models give 8k+1 frames, of which the first stands alone), an odd
    H or W the last row or column. For even sizes the transform keeps the sum of squares.
    """
    bands_NBCTHW = _padded_to_even(video_BCTHW).unsqueeze(0)
    for axis in _AXES:
        low, high = _split(bands_NBCTHW, axis + 1)
        bands_NBCTHW = torch.cat([low, high], dim=0)
    return bands_NBCTHW


def _split(bands: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    even, odd = torch.unflatten(bands, axis, (-1, 2)).unbind(axis + 1)
    return (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5


def _padded_to_even(video_BCTHW: Tensor) -> Tensor:
    frames, height, width = video_BCTHW.shape[2:]
    if frames % 2 == height % 2 == width % 2 == 0:
        return video_BCTHW
    return functional.pad(video_BCTHW, (0, width % 2, 0, height % 2, frames % 2, 0), mode="replicate")
