"""Mean and standard deviation of every latent channel, by which a diffusion model trained on the latents normalises them.

Shape suffixes: B batch, C latent channels; time and space follow.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LatentStatistics:
    """Accumulates posterior means.

        mean_c = sum of z_c / n
        std_c  = sqrt(sum of z_c^2 / n - mean_c^2)      over all n positions of all clips, in fp64

    Worked number: a channel with the values 1, 2, 3 and 6 has mean 3 and std sqrt(50/4 - 9) = 1.870829.
    """

    def __init__(self) -> None:
        self.num_clips = 0
        self._sums_3C: Tensor | None = None  # number of values, sum, sum of squares

    def update(self, mean_BC: Tensor) -> None:
        """Adds the posterior means of some clips, [B, C, ...]."""
        values_CN = mean_BC.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)
        counts_C = torch.full((len(values_CN),), float(values_CN.shape[1]), dtype=torch.float64)
        self._add(torch.stack([counts_C, values_CN.sum(1), values_CN.square().sum(1)]), num_clips=len(mean_BC))

    def merge(self, other: LatentStatistics) -> None:
        """Adds what another accumulator has seen."""
        if other._sums_3C is not None:
            self._add(other._sums_3C, num_clips=other.num_clips)

    def compute(self) -> dict[str, list[float]]:
        """Returns `latents_mean` and `latents_std`, one number for each channel; empty lists if there was no clip."""
        if self._sums_3C is None:
            return {"latents_mean": [], "latents_std": []}
        counts_C, sums_C, squares_C = self._sums_3C
        mean_C = sums_C / counts_C
        std_C = (squares_C / counts_C - mean_C.square()).clamp(min=0).sqrt()
        return {"latents_mean": mean_C.tolist(), "latents_std": std_C.tolist()}

    def _add(self, sums_3C: Tensor, *, num_clips: int) -> None:
        self._sums_3C = sums_3C if self._sums_3C is None else self._sums_3C + sums_3C
        self.num_clips += num_clips
