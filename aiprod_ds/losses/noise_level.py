"""How noisy each training sample is made: a shifted logit-normal level with a uniform part.

Owns the distribution and nothing about latents. Called by the diffusion trainer, which hands the levels to
`flow.py`. Every draw is a function of its sample's own seed, so that it depends neither on the batch nor on
the world size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aiprod_ds.config.losses import NoiseLevelConfig
from aiprod_ds.errors import DataError


def noise_level_shift(num_tokens: int, config: NoiseLevelConfig) -> float:
    """Returns mu, the mean of the logit of the noise level.

        mu = low_shift + (high_shift - low_shift) * (N - low_tokens) / (high_tokens - low_tokens)

    kept within [min_shift, max_shift].

    Worked number: defaults give 0.95 at 1024 tokens, 2.05 at 4096, 1.5 at 2560, and 3.0 from 6750 tokens on.

    Source: LTX-Video's trainer (the line). Deviation: bounded, because unbounded it reaches 18 at 50,000
    tokens, where nearly every level is 1 in fp32 and nothing but pure noise is trained.
    """
    slope = (config.high_shift - config.low_shift) / (config.high_tokens - config.low_tokens)
    shift = config.low_shift + slope * (num_tokens - config.low_tokens)
    if config.max_shift is not None:
        shift = min(shift, config.max_shift)
    return shift if config.min_shift is None else max(shift, config.min_shift)


def draw_noise_levels(config: NoiseLevelConfig, *, num_tokens: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Returns one noise level for each sample, [B] fp32 in [0,1] on the CPU.

        s = sigmoid(mu(N) + standard_deviation * z),  z normal

    A share of `uniform_fraction` of the samples has a level that is uniform in [0,1) instead.

    Args:
        config: The line and bounds of mu, the deviation of the logit, the uniform share.
        num_tokens: Latent tokens of each sample, padding not counted.
        seeds: One per sample, `stream_seed(seed, "noise_level", modality, sample_index, update)`. For a level
            that modalities share, draw once and hand it to both.

    Raises:
        DataError: If there is not one seed for each sample.
    """
    if len(seeds) != len(num_tokens):
        raise DataError(
            f"noise levels: need one seed for each of {len(num_tokens)} samples, got {len(seeds)}."
        )
    levels = [
        _draw(config, noise_level_shift(tokens, config), seed)
        for tokens, seed in zip(num_tokens, seeds, strict=True)
    ]
    return torch.stack(levels)


def _draw(config: NoiseLevelConfig, shift: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Always both draws in one order, so that a change of uniform_fraction leaves the normal ones as they
    # were.
    draws = torch.rand(2, generator=generator)
    if draws[0] < config.uniform_fraction:
        return draws[1]
    return torch.sigmoid(shift + config.standard_deviation * torch.randn((), generator=generator))
