"""How a reconstruction changes from frame to frame, compared with its clip: no optical flow, no network.

Owns two distances. Called by `video.py`. Shapes: B batch, C channels, T frames, H height, W width; of a
picture, a clip of one frame, both are 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from aiprod_ds.losses.precision import no_autocast, widened

FLICKER_PATCH = 8


def frame_difference_l1(reconstruction_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Returns the mean absolute difference of frame differences.

        L = mean|(y_{t+1} - y_t) - (x_{t+1} - x_t)|   over t = 1 .. T - 1

    An error that stays is free: what counts is how it changes. So it presses on flicker and on motion that
    lags behind, and leaves what a still picture lacks to the other terms.

    Worked number: x of 2 frames, y = x + 0.5 in the first and x + 0.2 in the second: 0.3, where the mean
    absolute error is 0.35.

    Args:
        reconstruction_BCTHW: [B,C,T,H,W], any float type and range.
        target_BCTHW: Same shape.

    Returns:
        0-dim fp32 (fp64 for fp64 inputs).

    Source: the gradient difference loss of Mathieu, Couprie and LeCun 2016 (Deep multi-scale video prediction
    beyond mean square error), equation 6, with alpha 1 and along time in place of space. Deviation: the
    differences themselves are compared and not their absolute values, so that a change of the wrong sign
    counts.
    """
    with no_autocast(reconstruction_BCTHW):
        error_BCTHW = widened(reconstruction_BCTHW) - widened(target_BCTHW)
        if error_BCTHW.shape[2] < 2:
            return error_BCTHW.new_zeros(())
        return error_BCTHW.diff(dim=2).abs().mean()


def flicker_l1(reconstruction_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Returns by how much more or less the patches of the reconstruction change between frames.

        a_tp(x) = mean over channels and the pixels of patch p of |x_{t+1} - x_t|
        L = mean over clips, t and p of |a_tp(y) - a_tp(x)|

    in patches of 8x8 pixels, smaller ones at the lower and the right edge. It asks how much is moving and not
    what: texture that boils where the clip is still counts in full, motion that is a pixel off hardly.

    Worked number: x still, y flickering between x and x + 0.5 in one of 4 patches: 0.5 / 4 = 0.125.

    Args:
        reconstruction_BCTHW: [B,C,T,H,W], any float type and range.
        target_BCTHW: Same shape.

    Returns:
        0-dim fp32 (fp64 for fp64 inputs).

    Source: own; a loss of what the flicker of the evaluation measures, mean |frame difference| against the
    clip's, kept apart by place and time so that too much here does not pay for too little there.
    """
    with no_autocast(reconstruction_BCTHW):
        if reconstruction_BCTHW.shape[2] < 2:
            return widened(reconstruction_BCTHW).new_zeros(())
        return (_activity(reconstruction_BCTHW) - _activity(target_BCTHW)).abs().mean()


def _activity(video_BCTHW: Tensor) -> Tensor:
    """Returns a_tp, [B, T-1, ceil(H/8), ceil(W/8)]."""
    change_BTHW = widened(video_BCTHW).diff(dim=2).abs().mean(dim=1)
    return functional.avg_pool2d(change_BTHW, FLICKER_PATCH, ceil_mode=True, count_include_pad=False)
