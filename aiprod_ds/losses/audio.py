"""The loss of the audio VAE: waveform, spectral distance, KL and mel distance, each under its own name.

Owns which terms there are and their weights; the formulas are in `spectral.py`, `mel.py` and `kl.py`. Called
by the audio VAE trainer. Shapes: B batch, C channels, N samples, L latent positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from aiprod_ds.config.losses import AudioVAELossConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.losses.kl import gaussian_kl, latent_statistics
from aiprod_ds.losses.mel import MelLoss
from aiprod_ds.losses.precision import no_autocast
from aiprod_ds.losses.spectral import SpectralLoss
from aiprod_ds.losses.terms import LossSum, LossTerms, add_kl, graph_for, weights_of
from aiprod_ds.losses.waveform import aligned_pair, sample_mean


class AudioVAELoss(nn.Module):
    """Sums the weighted terms of an audio VAE in fp32.

        L = lambda_w * mean|x - y| + lambda_s * SpectralLoss(x, y) + lambda_kl * KL
            + lambda_mel * MelLoss(x, y)
        KL = mean over clips and latent positions of the sum over channels

    Every clip weighs the same and counts only its true samples, frames and latent positions.

    Worked number: y equal to x but for one sample of 1024 that is 1 instead of 0, x silent, fft size 256,
    mean 2 and logvar 0 in 3 latent channels: L1 1/1024, spectral 1.644620, KL 6; with the default weights
    0.0000977 + 1.644620 + 0.0006 = 1.645318.

    Holds no parameters. Logged: `loss/total`, `loss/waveform_l1`, `loss/spectral`, `loss/kl`,
    `loss/kl_free_bits` (what is trained where there are free bits; `loss/kl` is without), `loss/mel` (if
    there is a sample rate), `latent/mean`, `latent/std`, `latent/collapsed_share`. Without a posterior there
    is no KL and no collapse.

    Args:
        config: Resolutions and the weights of one phase. None: the defaults.
        sample_rate_hz: Of the waveforms; None leaves the mel term out altogether, then its weight must be 0.

    Raises:
        ConfigError: If the mel weight is positive and there is no sample rate.
    """

    def __init__(
        self, config: AudioVAELossConfig | None = None, *, sample_rate_hz: int | None = None
    ) -> None:
        super().__init__()
        config = config or AudioVAELossConfig()
        if sample_rate_hz is None and config.mel_weight > 0:
            raise ConfigError(
                f"loss.mel_weight: must be 0 without a sample rate, got {config.mel_weight}. Pass "
                "sample_rate_hz."
            )
        self.config = config
        self.spectral = SpectralLoss(config.spectral)
        self.mel = None if sample_rate_hz is None else MelLoss(config.mel, sample_rate_hz=sample_rate_hz)

    def forward(
        self,
        reconstruction: Tensor,
        target: Tensor,
        mean: Tensor,
        logvar: Tensor | None,
        *,
        num_samples: Sequence[int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> LossTerms:
        """Returns the terms of one micro-batch.

        Args:
            reconstruction: [B,C,N'] or [B,N'] in [-1,1], any float type, N' at least N (cropped to N).
            target: [B,C,N] or [B,N]: the clip.
            mean: [B,channels,L] posterior mean.
            logvar: Posterior log-variance, the mean's shape or broadcastable to it; None for a deterministic
                autoencoder.
            num_samples: True length of each clip in samples, if padded. A clip of n samples owns the first
                ceil(n * L / N') latent positions.
            weights: By their names in the configuration, in place of its own.

        Raises:
            DataError: If the shapes do not fit.
        """
        weight, total = weights_of(self.config, weights), LossSum()
        with no_autocast(reconstruction):
            pair = aligned_pair(reconstruction, target, num_samples)
            with graph_for(weight["waveform_weight"]):
                waveform = sample_mean((pair.reconstruction - pair.target).abs(), pair)
            total.add("loss/waveform_l1", weight["waveform_weight"], waveform)
            with graph_for(weight["spectral_weight"]):
                spectral = self.spectral(reconstruction, target, num_samples=num_samples)
            total.add("loss/spectral", weight["spectral_weight"], spectral)
            posteriors = _true_posteriors(mean, logvar, num_samples, padded_samples=reconstruction.shape[-1])
            if logvar is not None:
                kl = partial(_mean_kl, posteriors)
                add_kl(total, weight["kl_weight"], kl, free_bits=self.config.kl_free_bits)
            if self.mel is not None:
                with graph_for(weight["mel_weight"]):
                    mel = self.mel(reconstruction, target, num_samples=num_samples)
                total.add("loss/mel", weight["mel_weight"], mel)
        for name, value in _statistics(posteriors).items():
            total.measure(name, value)
        return total.finish()


_Posterior = tuple[Tensor, Tensor | None]


def _true_posteriors(
    mean: Tensor, logvar: Tensor | None, num_samples: Sequence[int] | None, *, padded_samples: int
) -> list[_Posterior]:
    """Returns the posteriors without padding, one for each clip; a single one for the whole batch if nothing
    is padded."""
    if num_samples is None:
        return [(mean, logvar)]
    length = mean.shape[-1]
    owned = [-(-int(samples) * length // padded_samples) for samples in num_samples]
    expanded = None if logvar is None else torch.broadcast_to(logvar, mean.shape)
    return [
        (
            mean[clip : clip + 1, ..., :end],
            None if expanded is None else expanded[clip : clip + 1, ..., :end],
        )
        for clip, end in enumerate(owned)
    ]


def _mean_kl(posteriors: Sequence[_Posterior], *, free_bits: float) -> Tensor:
    return torch.stack(
        [
            gaussian_kl(mean, logvar, reduction="per_position", free_bits=free_bits)
            for mean, logvar in posteriors
            if logvar is not None
        ]
    ).mean()


def _statistics(posteriors: Sequence[_Posterior]) -> dict[str, Tensor]:
    if len(posteriors) == 1:
        return latent_statistics(*posteriors[0])
    means = torch.cat([mean for mean, _ in posteriors], dim=-1)
    logvars = [logvar for _, logvar in posteriors if logvar is not None]
    return latent_statistics(means, torch.cat(logvars, dim=-1) if logvars else None)
