"""Change between frames: both distances against numpy written as their formulas are, and their gradients.

fp64 throughout, so that 1e-12 is rounding; gradcheck's own tolerances hold for its finite differences.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from aiprod_ds.config.losses import VideoVAELossConfig
from aiprod_ds.losses import VideoVAELoss
from aiprod_ds.losses.temporal import flicker_l1, frame_difference_l1

Distance = Callable[[Tensor, Tensor], Tensor]
BOTH = pytest.mark.parametrize("distance", [frame_difference_l1, flicker_l1])


def _clips(height: int = 10, width: int = 19) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 2, 3, 4, height, width, dtype=torch.float64, generator=generator) * 2 - 1
    return first, second


def test_the_difference_of_frame_differences_is_its_formula() -> None:
    y, x = _clips()
    changes = [np.diff(clip.numpy(), axis=2) for clip in (y, x)]
    assert float(frame_difference_l1(y, x)) == pytest.approx(
        np.abs(changes[0] - changes[1]).mean(), rel=1e-12
    )


def test_flicker_is_its_formula() -> None:
    """10x19 pixels are 2x3 patches, of which only the first two in the first row are whole."""
    y, x = _clips()
    activities = []
    for clip in (y, x):
        change = np.abs(np.diff(clip.numpy(), axis=2)).mean(axis=1)
        rows = [
            [change[:, :, top : top + 8, left : left + 8].mean(axis=(2, 3)) for left in (0, 8, 16)]
            for top in (0, 8)
        ]
        activities.append(np.array(rows))
    expected = np.abs(activities[0] - activities[1]).mean()
    assert float(flicker_l1(y, x)) == pytest.approx(expected, rel=1e-12)


def test_the_worked_numbers() -> None:
    x = torch.zeros(1, 3, 2, 8, 8, dtype=torch.float64)
    y = x.clone()
    y[:, :, 0], y[:, :, 1] = 0.5, 0.2
    assert float(frame_difference_l1(y, x)) == pytest.approx(0.3, rel=1e-12)
    still = torch.zeros(1, 3, 5, 16, 16, dtype=torch.float64)
    flickering = still.clone()
    flickering[:, :, 1::2, :8, :8] = 0.5
    assert float(flicker_l1(flickering, still)) == pytest.approx(0.125, rel=1e-12)


def test_an_error_that_stays_and_motion_inside_a_patch_are_free() -> None:
    y, x = _clips(8, 8)
    assert float(frame_difference_l1(x + 0.5, x)) == pytest.approx(0.0, abs=1e-15)
    rolled = x.roll(1, dims=-1)  # moves within the one patch there is, so as much changes in it
    assert float(flicker_l1(rolled, x)) == pytest.approx(0.0, abs=1e-15)
    assert float(frame_difference_l1(rolled, x)) > 0.1
    assert float(flicker_l1(y, x)) > 0.01


@BOTH
def test_gradients_are_those_of_finite_differences(distance: Distance) -> None:
    y, x = (clip[:1, :2, :3].contiguous() for clip in _clips(2, 9))
    assert torch.autograd.gradcheck(distance, (y.requires_grad_(), x.requires_grad_()))


@BOTH
def test_a_picture_has_none(distance: Distance) -> None:
    y, x = (clip[:, :, :1] for clip in _clips())
    assert float(distance(y, x)) == 0.0


@BOTH
def test_half_precision_is_compared_in_fp32(distance: Distance) -> None:
    y, x = (clip.bfloat16() for clip in _clips())
    assert distance(y, x).dtype == torch.float32
    assert torch.equal(distance(y, x), distance(y.float(), x.float()))


def test_the_loss_adds_them_where_they_have_a_weight() -> None:
    y, x = (clip.float() for clip in _clips())
    mean = logvar = torch.zeros(2, 4, 2)
    plain = VideoVAELossConfig(perceptual_weight=0.0)
    unweighed = VideoVAELoss(plain, None)(y, x, mean, logvar)
    assert not {"loss/frame_difference", "loss/flicker"} & set(unweighed.terms)
    config = plain.model_copy(update={"frame_difference_weight": 2.0, "flicker_weight": 0.5})
    terms = VideoVAELoss(config, None)(y, x, mean, logvar)
    extra = 2.0 * frame_difference_l1(y, x) + 0.5 * flicker_l1(y, x)
    assert float(terms.total - unweighed.total) == pytest.approx(float(extra), rel=1e-5)
    now = VideoVAELoss(config, None)(y, x, mean, logvar, weights={"flicker_weight": 0.0})
    assert float(now.terms["loss/flicker"]) == float(terms.terms["loss/flicker"])
    assert float(terms.total - now.total) == pytest.approx(0.5 * float(flicker_l1(y, x)), rel=1e-4)
