"""Each formula against numpy in fp64 (tolerance: a few roundings), worked numbers and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aiprod_ds.losses.adversarial import (
    Objective,
    accuracies,
    adaptive_weight,
    discriminator_loss,
    feature_matching,
    generator_loss,
    lecam,
    mean_logit,
    r1_penalty,
)

OBJECTIVES: tuple[Objective, ...] = ("hinge", "lsgan")


def _logits(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 1, 3, 4), (2, 5)]  # of two discriminators with other numbers of patches
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _mean(values: list[np.ndarray]) -> float:
    return float(np.mean([value.mean() for value in values]))


def test_both_sides_of_the_hinge_are_the_formula() -> None:
    real, fake = _logits(0), _logits(1)
    of_real = _mean([np.maximum(1 - each.numpy(), 0) for each in real])
    of_fake = _mean([np.maximum(1 + each.numpy(), 0) for each in fake])
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(
        0.5 * (of_real + of_fake), rel=1e-12
    )
    assert float(generator_loss(fake, "hinge")) == pytest.approx(
        -_mean([each.numpy() for each in fake]), rel=1e-12
    )


def test_both_sides_of_least_squares_are_the_formula() -> None:
    real, fake = _logits(0), _logits(1)
    of_real, of_fake = (
        _mean([(each.numpy() - 1) ** 2 for each in real]),
        _mean([each.numpy() ** 2 for each in fake]),
    )
    to_one = _mean([(each.numpy() - 1) ** 2 for each in fake])
    assert float(discriminator_loss(real, fake, "lsgan")) == pytest.approx(
        0.5 * (of_real + of_fake), rel=1e-12
    )
    assert float(generator_loss(fake, "lsgan")) == pytest.approx(to_one, rel=1e-12)


def test_the_worked_numbers() -> None:
    real, fake = [torch.tensor([0.5])], [torch.tensor([-2.0])]
    assert float(discriminator_loss(real, fake, "hinge")) == 0.25
    assert float(discriminator_loss(real, fake, "lsgan")) == 2.125
    assert [float(generator_loss(fake, objective)) for objective in OBJECTIVES] == [2.0, 9.0]
    assert float(feature_matching([[torch.tensor([1.0, 3.0])]], [[torch.tensor([2.0, 3.0])]])) == 0.5
    means = {"mean_real": torch.tensor(0.5), "mean_fake": torch.tensor(-0.5)}
    assert float(lecam([torch.tensor([2.0])], [torch.tensor([-1.0])], **means)) == 8.5
    clips = torch.ones(1, 2, requires_grad=True)
    assert r1_penalty([3.0 * clips], clips).item() == 2.25
    found = adaptive_weight(torch.tensor(3.0), torch.tensor(0.5), epsilon=1e-4, most=1e4)
    assert float(found) == pytest.approx(5.998800, rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_discriminator_counts_more_for_its_patches(objective: Objective) -> None:
    few, many = torch.full((1, 2), -3.0), torch.full((1, 200), 5.0)
    alone = (generator_loss([few], objective) + generator_loss([many], objective)) / 2
    assert float(generator_loss([few, many], objective)) == pytest.approx(float(alone))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    real, fake = ([each.requires_grad_() for each in _logits(seed)] for seed in (2, 3))
    means = {"mean_real": torch.tensor(0.3).double(), "mean_fake": torch.tensor(-0.2).double()}
    assert torch.autograd.gradcheck(
        lambda *all_: discriminator_loss(all_[:2], all_[2:], objective), (*real, *fake)
    )
    assert torch.autograd.gradcheck(lambda *all_: generator_loss(all_, objective), tuple(fake))
    assert torch.autograd.gradcheck(lambda *all_: lecam(all_[:2], all_[2:], **means), (*real, *fake))
    assert torch.autograd.gradcheck(lambda *all_: feature_matching([real], [all_]), tuple(fake))


def test_lecam_is_the_formula() -> None:
    real, fake = _logits(4), _logits(5)
    found = lecam(real, fake, mean_real=torch.tensor(0.7), mean_fake=torch.tensor(-0.1))
    of_real = _mean([np.maximum(each.numpy() + 0.1, 0) ** 2 for each in real])
    of_fake = _mean([np.maximum(0.7 - each.numpy(), 0) ** 2 for each in fake])
    assert float(found) == pytest.approx(of_real + of_fake, rel=1e-7)  # the means are fp32


def test_feature_matching_has_a_gradient_to_reconstructions_only() -> None:
    real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    feature_matching([[real]], [[fake]]).backward()  # type: ignore[no-untyped-call]
    assert real.grad is None
    assert fake.grad is not None


def test_r1_is_half_the_squared_gradient_of_a_quadratic_and_differentiable() -> None:
    """D(x) = w * x^2 for each sample: ds/dx_i = 2 w x_i / n, so R1 = 2 w^2 mean_b |x_b|^2 / n^2 and
    dR1/dw = 2 R1 / w."""
    clips = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weight = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    leaf = clips.clone().requires_grad_()
    found = r1_penalty([weight * leaf.square()], leaf)
    expected = 2 * 1.7**2 * float(clips.square().sum(1).mean()) / 16
    assert found.item() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(found, weight)
    assert slope.item() == pytest.approx(2 * expected / 1.7, rel=1e-12)


def test_r1_counts_each_discriminator_alike() -> None:
    clips = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    both = r1_penalty([3.0 * clips, 5.0 * clips], clips)
    assert both.item() == pytest.approx(0.5 * 2 * (4.0 / 2) ** 2)  # the mean slope 4, over 2 samples


def test_the_adaptive_weight_is_bounded_and_constant() -> None:
    norms = torch.tensor([1.0, 0.0], requires_grad=True)
    found = adaptive_weight(norms[0], norms[1], epsilon=1e-6, most=100.0)
    assert float(found) == 100.0
    assert not found.requires_grad


def test_accuracies_are_shares_on_the_own_side() -> None:
    real, fake = [torch.tensor([0.6, 0.4, -1.0, 2.0])], [torch.tensor([0.4, -0.1, 0.7, 3.0])]
    assert [float(each) for each in accuracies(real, fake, "hinge")] == [0.75, 0.25]
    assert [float(each) for each in accuracies(real, fake, "lsgan")] == [0.5, 0.5]


def test_the_mean_logit_is_over_discriminators() -> None:
    assert float(mean_logit([torch.tensor([1.0, 3.0]), torch.tensor([8.0])])) == 5.0
