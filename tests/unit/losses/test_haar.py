"""Haar bands: closed forms, energy conservation, finite differences."""

import math

import pytest
import torch

from aiprod_ds.losses.haar import haar_bands, haar_l1


def _video(*shape, dtype=torch.float64):
    return (
        torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 2 - 1
    )


def test_a_constant_difference_lands_in_the_low_pass_band():
    x = _video(2, 3, 4, 6, 8)

    # fp64 rounding only.
    assert haar_l1(x + 0.5, x).item() == pytest.approx(0.5 * 2 * math.sqrt(2) / 8, rel=1e-12)


def test_even_sizes_keep_the_sum_of_squares():
    x = _video(2, 3, 4, 6, 8)
    bands = haar_bands(x)

    assert bands.shape == (8, 2, 3, 2, 3, 4)
    torch.testing.assert_close(bands.square().sum(), x.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("axis", "band"), [(2, 1), (3, 2), (4, 4)])
def test_each_axis_has_its_own_high_pass_band(axis, band):
    size = [1, 1, 2, 2, 2]
    alternating = (
        torch.tensor([1.0, -1.0], dtype=torch.float64)
        .view([2 if index == axis else 1 for index in range(5)])
        .expand(size)
    )
    energy = haar_bands(alternating).square().flatten(1).sum(dim=1)

    # The order is low before high per axis, later axes doubling the list: T is bit 0, H bit 1, W bit 2.
    torch.testing.assert_close(energy, torch.eye(8, dtype=torch.float64)[band] * 8, rtol=1e-12, atol=1e-12)


def test_odd_sizes_repeat_the_first_frame_and_the_last_row_and_column():
    x = _video(1, 1, 3, 5, 7)
    padded = torch.cat([x[:, :, :1], x], dim=2)
    padded = torch.cat([padded, padded[..., -1:, :]], dim=3)
    padded = torch.cat([padded, padded[..., -1:]], dim=4)

    torch.testing.assert_close(haar_bands(x), haar_bands(padded), rtol=0, atol=0)


def test_a_single_frame_works():
    assert haar_bands(_video(1, 3, 1, 4, 4)).shape == (8, 1, 3, 1, 2, 2)


def test_identity_is_zero_and_the_gradient_is_right():
    x = _video(1, 1, 3, 3, 2)
    y = (
        _video(1, 1, 3, 3, 2).flip(2).mul(0.7).requires_grad_()
    )  # no band of the difference is at the kink of the absolute value

    assert haar_l1(x, x).item() == 0.0
    assert torch.autograd.gradcheck(lambda reconstruction: haar_l1(reconstruction, x), (y,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_fp32(dtype):
    x, y = _video(1, 3, 4, 4, 4, dtype=dtype), _video(1, 3, 4, 4, 4, dtype=dtype).flip(2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = haar_l1(y, x)

    assert value.dtype == torch.float32
    # Same rounded inputs on both sides: fp32 rounding only.
    assert value.item() == pytest.approx(haar_l1(y.double(), x.double()).item(), rel=1e-5)
