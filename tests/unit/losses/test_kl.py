"""Gaussian KL against torch.distributions, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from aiprod_ds.errors import DataError
from aiprod_ds.losses.kl import gaussian_kl, latent_statistics


def _posterior(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    logvar = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return mean.to(dtype), logvar.to(dtype)


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 2.0), ("per_position", 6.0), ("per_input_element", 0.5)]
)
def test_worked_numbers_of_the_docstring(reduction, expected):
    mean, logvar = torch.full((5, 3, 2, 2), 2.0), torch.zeros(5, 3, 2, 2)

    assert gaussian_kl(mean, logvar, reduction=reduction, input_elements=48).item() == expected


def test_mean_agrees_with_torch_distributions():
    mean, logvar = _posterior()
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()

    # fp64 on both sides: rounding only.
    torch.testing.assert_close(gaussian_kl(mean, logvar, reduction="mean"), expected, rtol=1e-12, atol=0)


def test_per_input_element_does_not_depend_on_resolution():
    mean, logvar = _posterior()
    small = gaussian_kl(mean, logvar, reduction="per_input_element", input_elements=1000)
    doubled = gaussian_kl(
        mean.repeat(1, 1, 1, 2, 1),
        logvar.repeat(1, 1, 1, 2, 1),
        reduction="per_input_element",
        input_elements=2000,
    )

    torch.testing.assert_close(small, doubled, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "per_position", "per_input_element"])
def test_gradient_agrees_with_finite_differences(reduction):
    mean, logvar = (tensor[:1, :, :1, :2, :2].requires_grad_() for tensor in _posterior())

    assert torch.autograd.gradcheck(
        lambda m, v: gaussian_kl(m, v, reduction=reduction, input_elements=7), (mean, logvar)
    )


@pytest.mark.parametrize("logvar", [-1e4, 1e4])
def test_extreme_log_variances_stay_finite(logvar):
    mean = torch.zeros(1, 2, 3, requires_grad=True)
    wild = torch.full((1, 2, 3), logvar, requires_grad=True)
    bound = max(-30.0, min(10.0, logvar))

    kl = gaussian_kl(mean, wild, reduction="mean")
    kl.backward()

    # fp32 exp of 10 is exact to 1e-6 relative.
    assert kl.item() == pytest.approx(0.5 * (math.exp(bound) - 1 - bound), rel=1e-6)
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(wild.grad).all()


def test_a_nearly_collapsed_posterior_keeps_its_digits():
    # exp(v) - 1 - v is v^2/2 = 5e-9 here: computed with exp in fp32 it would be 0 or 1e-7.
    kl = gaussian_kl(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e-4), reduction="mean")

    assert kl.item() == pytest.approx(2.5e-9, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_are_computed_in_fp32(dtype, autocast):
    mean, logvar = _posterior(dtype)
    expected = gaussian_kl(mean.double(), logvar.double(), reduction="mean")

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kl = gaussian_kl(mean, logvar, reduction="mean")

    assert kl.dtype == torch.float32
    # The inputs are the same rounded numbers, so only fp32 rounding remains.
    assert kl.item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_log_variance_shared_by_all_channels_is_broadcast():
    mean, logvar = _posterior()
    shared = logvar[:, :1]

    assert gaussian_kl(mean, shared, reduction="mean") == gaussian_kl(
        mean, shared.expand_as(mean), reduction="mean"
    )


def test_wrong_shapes_are_named():
    with pytest.raises(DataError, match=r"logvar: must have the mean's shape \[2, 3, 4\] .* got \[2, 5, 4\]"):
        gaussian_kl(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), reduction="mean")
    with pytest.raises(DataError, match=r"posterior mean: .* got \[0, 3\]"):
        gaussian_kl(torch.zeros(0, 3), torch.zeros(0, 3), reduction="mean")


def test_statistics_worked_number_of_the_docstring():
    mean = torch.zeros(4, 2, 5)
    mean[:, 0] = 3.0

    statistics = latent_statistics(mean.requires_grad_(), torch.zeros(4, 2, 5))

    assert {name: value.item() for name, value in statistics.items()} == {
        "latent/mean": 1.5,
        "latent/std": 1.5,
        "latent/collapsed_share": 0.5,
    }
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize(("mean_value", "share"), [(0.14, 1.0), (0.15, 0.0)])
def test_collapse_threshold_is_a_hundredth_of_a_nat(mean_value, share):
    # KL is mean^2 / 2: 0.0098 and 0.01125 nats.
    statistics = latent_statistics(torch.full((1, 3, 4), mean_value), torch.zeros(1, 3, 4))

    assert statistics["latent/collapsed_share"].item() == share


FREE = 0.3
POSITIONS = 2 * 4 * 4


def _floored(mean: torch.Tensor, logvar: torch.Tensor) -> np.ndarray:
    """[B,C]: what each channel counts with, in the middle of its positions."""
    m, v = mean.numpy(), logvar.numpy()
    kl = 0.5 * (m**2 + np.exp(v) - 1 - v)
    return np.maximum(kl.mean(axis=(2, 3, 4)), FREE)


@pytest.mark.parametrize("reduction", ["mean", "per_position", "per_input_element"])
def test_free_bits_are_a_floor_for_each_channel_of_each_clip(reduction):
    mean, logvar = _posterior()
    mean, logvar = mean.clone(), logvar.clone()
    mean[0, 1], logvar[0, 1] = 0.1, 0.01  # a channel below the floor, in one clip
    floored = _floored(mean, logvar)
    assert (floored == FREE).sum() == 1, "otherwise the floor is not tested"
    expected = {
        "mean": floored.mean(),
        "per_position": floored.sum(axis=1).mean(),
        "per_input_element": POSITIONS * floored.sum(axis=1).mean() / 7,
    }[reduction]
    found = gaussian_kl(mean, logvar, reduction=reduction, input_elements=7, free_bits=FREE)

    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_worked_number_of_free_bits():
    channels = torch.tensor([2.0, 0.1414213562373095], dtype=torch.float64)  # mean^2 / 2 is 2.0 and 0.01
    mean = channels.view(1, 2, 1).expand(1, 2, 5)

    assert gaussian_kl(mean, torch.zeros(1, 1, 1).double(), reduction="mean", free_bits=0.5).item() == 1.25


def test_a_channel_below_the_floor_is_not_pressed():
    mean, logvar = (torch.full((1, 2, 3), 0.1, dtype=torch.float64) for _ in range(2))
    mean[:, 1] = 3.0
    mean.requires_grad_()
    gaussian_kl(mean, logvar, reduction="per_position", free_bits=FREE).backward()

    assert mean.grad[:, 0].abs().sum() == 0
    torch.testing.assert_close(mean.grad[:, 1], torch.full((1, 3), 1.0, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "per_position", "per_input_element"])
def test_gradient_with_free_bits_agrees_with_finite_differences(reduction):
    mean, logvar = (tensor[:, :, :1, :2, :2].contiguous().requires_grad_() for tensor in _posterior())

    assert torch.autograd.gradcheck(
        lambda m, v: gaussian_kl(m, v, reduction=reduction, input_elements=7, free_bits=FREE), (mean, logvar)
    )


def test_free_bits_do_not_depend_on_how_clips_are_batched():
    mean, logvar = _posterior()
    whole = gaussian_kl(mean, logvar, reduction="per_position", free_bits=FREE)
    each = [
        gaussian_kl(mean[clip : clip + 1], logvar[clip : clip + 1], reduction="per_position", free_bits=FREE)
        for clip in range(len(mean))
    ]

    torch.testing.assert_close(torch.stack(each).mean(), whole, rtol=1e-12, atol=0)


def test_without_a_posterior_there_is_no_collapse():
    mean, _ = _posterior()

    assert set(latent_statistics(mean, None)) == {"latent/mean", "latent/std"}
