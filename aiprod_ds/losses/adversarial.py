"""The losses of a discriminator and of what is trained against it.

Owns the formulas: both sides of the hinge and the least-squares objective, feature matching, LeCAM, R1 and
the adaptive weight. The networks are `aiprod_ds.models.discriminators`, the order of an update is
`aiprod_ds.trainers.adversarial`. Every mean is first one over the logits of a discriminator, then over
discriminators, so that none counts more for having more patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from aiprod_ds.losses.precision import widened

Objective = Literal["hinge", "lsgan"]
Logits = Sequence[Tensor]  # of each discriminator, of any shape, fp32 or fp64

# What keeps a vanishing gradient of the discriminator from an infinite weight.
LAST_LAYER_EPSILON, OUTPUT_EPSILON = 1e-4, 1e-6


def discriminator_loss(real: Logits, fake: Logits, objective: Objective) -> Tensor:
    """Returns what the discriminator minimises, 0-dim.

        hinge:  0.5 * (mean relu(1 - D(x)) + mean relu(1 + D(y)))
        lsgan:  0.5 * (mean (D(x) - 1)^2 + mean D(y)^2)

    Worked number: logits 0.5 of data x and -2 of reconstructions y: hinge 0.5 * (0.5 + 0) = 0.25; lsgan
    0.5 * (0.25 + 4) = 2.125.

    Args:
        real: Of the data.
        fake: Of the reconstructions.
        objective: Which of the two.

    Source: hinge as in Lim and Ye 2017, halved as in Esser et al. 2021 (VQGAN); Mao et al. 2017, equation 9,
    with a = 0, b = 1.
    """
    if objective == "hinge":
        of_real = _mean([F.relu(1.0 - logits) for logits in real])
        of_fake = _mean([F.relu(1.0 + logits) for logits in fake])
    else:
        of_real = _mean([(logits - 1.0).square() for logits in real])
        of_fake = _mean([logits.square() for logits in fake])
    return 0.5 * (of_real + of_fake)


def generator_loss(fake: Logits, objective: Objective) -> Tensor:
    """Returns what is minimised against the discriminator, 0-dim.

        hinge:  -mean D(y)
        lsgan:  mean (D(y) - 1)^2

    Worked number: logits -2 give 2 and 9.

    Source: as `discriminator_loss`; for lsgan without the factor 1/2, as in HiFi-GAN (Kong et al. 2020,
    equation 2).
    """
    if objective == "hinge":
        return -_mean(fake)
    return _mean([(logits - 1.0).square() for logits in fake])


def feature_matching(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns the distance of the features of reconstructions to those of the data, 0-dim fp32 (fp64 of
    fp64).

        mean over discriminators and their layers l of mean|f_l(x) - f_l(y)|

    Worked number: one layer with features 1 and 3 of the data, 2 and 3 of the reconstruction: 0.5.

    Args:
        real: Of each discriminator, what its layers gave of the data; constant.
        fake: Of the reconstructions.

    Source: Kong et al. 2020 (HiFi-GAN), equation 4; there a sum over layers and discriminators.
    """
    distances = [
        widened(y - x.detach()).abs().mean()
        for of_real, of_fake in zip(real, fake, strict=True)
        for x, y in zip(of_real, of_fake, strict=True)
    ]
    return torch.stack(distances).mean()


def lecam(real: Logits, fake: Logits, *, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Returns LeCAM's regulariser of the discriminator, 0-dim.

        mean relu(D(x) - a_fake)^2 + mean relu(a_real - D(y))^2

    with a_real and a_fake the running means of D(x) and D(y): it grows with how far the two sides stand
    apart, and so holds back a discriminator that has seen too little data.

    Worked number: logits 2 and -1, running means 0.5 (real) and -0.5 (fake): 2.5^2 + 1.5^2 = 8.5.

    Args:
        real: Of the data.
        fake: Of the reconstructions.
        mean_real: 0-dim, constant.
        mean_fake: 0-dim, constant.

    Source: Tseng et al. 2021 (LeCam-GAN), with the rectifiers of their code, google/lecam-gan, which VidTok
    has too.
    """
    of_real = _mean([F.relu(logits - mean_fake).square() for logits in real])
    return of_real + _mean([F.relu(mean_real - logits).square() for logits in fake])


def r1_penalty(real: Logits, clips: Tensor) -> Tensor:
    """Returns R1, half the squared gradient of the discriminator at the data, 0-dim, differentiable.

        0.5 * mean over clips b of ||d s_b / d x_b||^2,   s_b = mean of the logits of clip b

    Worked number: D(x) = 3 * x of clips with two samples, each a logit: s = 1.5 * (x_1 + x_2), so 0.5 *
    (1.5^2 + 1.5^2) = 2.25.

    Args:
        real: Of `clips`, with its graph; the batch first.
        clips: A leaf that needs a gradient.

    Source: Mescheder et al. 2018, equation 9. Deviation: the mean over the logits of a patch discriminator,
    since that is what its loss takes.
    """
    score = torch.stack([logits.flatten(1).mean(dim=1) for logits in real]).mean(dim=0).sum()
    (gradient,) = torch.autograd.grad(score, clips, create_graph=True)
    return 0.5 * gradient.flatten(1).square().sum(dim=1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, *, epsilon: float, most: float) -> Tensor:
    """Returns the factor that makes the adversarial gradient as long as that of the other terms, 0-dim.

        lambda = min(||g_rec|| / (||g_adv|| + epsilon), most)

    Worked number: norms 3 and 0.5, epsilon 1e-4: 3 / 0.5001 = 5.998800.

    Args:
        reconstruction: ||g_rec||, 0-dim: the gradient of the other terms.
        adversarial: ||g_adv||, 0-dim: the gradient of the adversarial term before its weight.
        epsilon: 1e-4 at the last layer's weight, 1e-6 at the output.
        most: Its upper bound.

    Source: Esser et al. 2021 (VQGAN), equation 7, and CompVis/taming-transformers,
    taming/modules/losses/vqperceptual.py, calculate_adaptive_weight: epsilon 1e-4, bound 1e4.
    """
    return (reconstruction / (adversarial + epsilon)).clamp(max=most).detach()


def accuracies(real: Logits, fake: Logits, objective: Objective) -> tuple[Tensor, Tensor]:
    """Returns which share of the logits of data, and of reconstructions, is on its own side of 0 (hinge) or
    1/2 (lsgan); 0-dim fp32."""
    middle = 0.0 if objective == "hinge" else 0.5
    of_real = _mean([(logits.detach() > middle).float() for logits in real])
    return of_real, _mean([(logits.detach() < middle).float() for logits in fake])


def mean_logit(logits: Logits) -> Tensor:
    """Returns the mean over logits and discriminators, 0-dim, without a gradient."""
    return _mean([each.detach() for each in logits])


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.mean() for value in values]).mean()
