"""Divergence of a diagonal Gaussian posterior from the unit normal, and what to watch about it.

Owns the formula, its three reductions and the latent statistics; the weights are those of the losses that
call it (`video.py`, `audio.py`). Latents are [B, C, ...]: channels second, any positions after.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.losses.precision import no_autocast, widened

KLReduction = Literal["per_input_element", "mean", "per_position"]

LOGVAR_MIN, LOGVAR_MAX = (
    -30.0,
    10.0,
)  # exp(11.09) is the largest fp16 number; the usual bound of 20 overflows there
COLLAPSED_NATS = 0.01


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    reduction: KLReduction,
    input_elements: int | None = None,
    free_bits: float = 0.0,
) -> Tensor:
    """Returns KL(N(mean, exp(logvar)) || N(0, 1)), reduced.

        KL_i = 0.5 * (mean_i^2 + exp(logvar_i) - 1 - logvar_i),   logvar clamped to [-30, 10]

    Worked number: mean 2, logvar 0 gives 2.0 nats in every element; with 3 channels and 4 positions per
    sample of 48 input elements: `mean` 2.0, `per_position` 6.0, `per_input_element` 2 * 12 / 48 = 0.5.

    With free bits f > 0 each channel c of each sample b counts with at least f, so that a channel that has
    come down to it is pressed no further:

        k_bc = mean over positions of KL_i,   KL_i replaced by max(f, k_bc) for all of them

    Worked number: channels whose KL is 2.0 and 0.01 in every position, f = 0.5: `mean` (2.0 + 0.5) / 2 =
    1.25.

    Args:
        mean: [B, C, ...] any float type.
        logvar: Same shape, or broadcastable to it (some models share one value between channels).
        reduction: `per_input_element`: sum over the sample's latents divided by `input_elements`, mean over
            the batch, so that the weight does not depend on resolution or duration. `mean`: over all latent
            elements. `per_position`: sum over channels, mean over batch and positions.
        input_elements: Elements of one input sample (C*T*H*W of a clip); needed by `per_input_element` only.
        free_bits: f, in nats (the name is the literature's); 0 is the plain divergence.

    Returns:
        0-dim fp32 (fp64 for fp64 inputs), nats.

    Source: Kingma and Welling 2013, appendix B; the first reduction is that of latent-diffusion
    `contperceptual.py` (KL sum over the batch size beside a summed reconstruction), with both sides divided
    by the input elements. Free bits: Kingma et al. 2016 (Improving variational inference with inverse
    autoregressive flow), equation 15; deviation: the expectation inside the maximum is over the positions of
    one sample, not over a mini-batch, so that the loss does not depend on how clips are spread over ranks.
    """
    with no_autocast(mean):
        kl = _elementwise_kl(mean, logvar)
        if free_bits > 0:
            # The same number stands at every position, so that the reductions below need no case of it.
            positions = kl.flatten(2) if kl.dim() > 2 else kl.unsqueeze(2)
            kl = positions.mean(dim=2, keepdim=True).clamp(min=free_bits).expand_as(positions)
        if reduction == "mean":
            return kl.mean()
        if reduction == "per_position":
            return kl.sum(dim=1).mean()
        assert input_elements, "per_input_element needs the number of input elements"
        return kl.flatten(1).sum(dim=1).mean() / input_elements


@torch.no_grad()
def latent_statistics(mean: Tensor, logvar: Tensor | None) -> dict[str, Tensor]:
    """Returns `latent/mean`, `latent/std` and, of a posterior, `latent/collapsed_share`, 0-dim fp32.

    Mean and (biased) standard deviation are those of the posterior mean over all elements; noise that the
    posterior adds would hide a collapse from them. A channel is collapsed when its KL, averaged over batch
    and positions, is below 0.01 nats.

    Worked number: two channels, of means +3 and 0, logvar 0: `latent/mean` 1.5, `latent/std` 1.5,
    `latent/collapsed_share` 0.5.
    """
    with no_autocast(mean):
        wide_mean = widened(mean)
        found = {"latent/mean": wide_mean.mean(), "latent/std": wide_mean.std(correction=0)}
        if logvar is not None:
            channel_kl = _elementwise_kl(mean, logvar).transpose(0, 1).flatten(1).mean(dim=1)
            collapsed = (channel_kl < COLLAPSED_NATS).to(wide_mean.dtype).mean()
            found["latent/collapsed_share"] = collapsed
        return found


def _elementwise_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    wide_mean, wide_logvar = _widened_pair(mean, logvar)
    # expm1 keeps the digits that exp(logvar) - 1 loses where logvar is near 0, which is where a collapsing
    # posterior goes.
    return 0.5 * (wide_mean.square() + torch.expm1(wide_logvar) - wide_logvar)


def _widened_pair(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    if mean.dim() < 2 or mean.numel() == 0:
        raise DataError(
            f"posterior mean: must be [B, C, ...] and not empty, got {list(mean.shape)}. Check the model's "
            "encoder."
        )
    try:
        expanded = logvar.expand_as(mean)
    except RuntimeError as error:
        raise DataError(
            f"posterior logvar: must have the mean's shape {list(mean.shape)} or broadcast to it, got "
            f"{list(logvar.shape)}. "
            "Check the model's encoder."
        ) from error
    return widened(mean), widened(expanded).clamp(LOGVAR_MIN, LOGVAR_MAX)
