"""The latent between an encoder and a decoder: finding the posterior, drawing from it, and drawing the same
on every rank.

Called by the modules that wrap VAEs. L stands for latent channels; time and space follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aiprod_ds.errors import ConfigError, EngineError

LOGVAR_RANGE = (-30.0, 10.0)  # exp(11.09) is the largest fp16 number


def split_posterior(encoded: Any) -> tuple[Tensor, Tensor | None]:
    """Returns (mean, logvar) of whatever `encode` returned; logvar is None when there is no posterior."""
    if isinstance(encoded, Tensor):
        return encoded, None
    if isinstance(encoded, tuple) and len(encoded) == 2:
        return encoded
    for name in ("latent", "latents"):  # diffusers' EncoderOutput and its like
        if isinstance(latent := getattr(encoded, name, None), Tensor):
            return latent, None
    posterior = getattr(encoded, "latent_dist", encoded)
    if not hasattr(posterior, "logvar") and hasattr(posterior, "mode"):
        return posterior.mode(), None  # diffusers' IdentityDistribution: a deterministic autoencoder
    if not (hasattr(posterior, "mean") and hasattr(posterior, "logvar")):
        raise ConfigError(
            "model: encode must return latent_dist, (mean, logvar) or a tensor, got "
            f"{type(encoded).__name__}."
        )
    if hasattr(posterior, "scale"):
        return posterior.mean, _oobleck_logvar(posterior.scale)
    return posterior.mean, posterior.logvar


def draw_latent(encoded: Any, noise: Tensor | Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns a latent with the posterior that it comes from.

        latent = mean + exp(logvar / 2) * noise

    Args:
        encoded: What `encode` returned.
        noise: [B,L,...], normal, or one seed per sample for it, so that a draw does not depend on the rank or
            the batch it falls in; None takes the mean.

    Returns:
        (latent, mean, logvar), all fp32; logvar is clamped to `LOGVAR_RANGE`, or None for a deterministic
        autoencoder.

    Raises:
        ConfigError: If `encoded` is nothing known.
        EngineError: If the noise has another shape than the latent, or seeds another number than samples.
    """
    mean, logvar = split_posterior(encoded)
    mean, logvar = mean.float(), None if logvar is None else logvar.float().clamp(*LOGVAR_RANGE)
    if noise is None or logvar is None:
        return mean, mean, logvar
    drawn = noise if isinstance(noise, Tensor) else _noise_like(mean, noise)
    if drawn.shape != mean.shape:
        raise EngineError(
            f"posterior noise: must have the latent's shape {tuple(mean.shape)}, got {tuple(drawn.shape)}."
        )
    return mean + (0.5 * logvar).exp() * drawn, mean, logvar


def decoded_sample(decoded: Any) -> Tensor:
    """Returns the tensor in what `decode` returned: itself, or its `sample`."""
    sample: Tensor = decoded if isinstance(decoded, Tensor) else decoded.sample
    return sample


def _oobleck_logvar(scale: Tensor) -> Tensor:
    # Its own logvar is the logarithm of (softplus + 1e-4)^2 in the model's precision: in fp16 that is 0 below
    # a deviation of 1.7e-4, and its gradient NaN (diffusers 0.42.1, autoencoder_oobleck.py,
    # OobleckDiagonalGaussianDistribution).
    return 2 * (F.softplus(scale.float()) + 1e-4).log()


def _noise_like(mean: Tensor, seeds: Sequence[int]) -> Tensor:
    if len(seeds) != len(mean):
        raise EngineError(f"posterior noise: needs one seed per sample ({len(mean)}), got {len(seeds)}.")
    return draw_noise(mean.shape[1:], seeds).to(mean.device)


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Returns the noise of latents of `shape`, [B,*shape] fp32 on the CPU, each of its own seed."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
