"""The loss of a VAE of log-mel spectrograms: L1 and KL, each under its own name.

Called by the audio VAE trainer for models that take spectrograms; waveforms have `audio.py`. Shapes: B batch,
C channels, T frames, M mel bands.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from aiprod_ds.errors import DataError
from aiprod_ds.losses.kl import gaussian_kl, latent_statistics
from aiprod_ds.losses.precision import no_autocast, widened
from aiprod_ds.losses.terms import LossSum, LossTerms, add_kl


class MelVAELoss(nn.Module):
    """Sums the weighted terms of a mel VAE in fp32.

        L = lambda_mel * mean|X - Y| + lambda_kl * KL      X, Y natural logarithms of mel magnitudes
        KL = mean over clips and latent positions of the sum over channels

    Worked number: Y louder than X by a factor of e everywhere, mean 2 and logvar 0 in 3 latent channels: 1 +
    lambda_kl * 6 with lambda_mel = 1, so 1.0006 with lambda_kl = 1e-4.

    Holds no parameters. Logged: `loss/total`, `loss/mel`, `loss/kl`, `loss/kl_free_bits` (what is trained
    where there are free bits; `loss/kl` is without), `latent/mean`, `latent/std`, `latent/collapsed_share`.
    Without a posterior there is no KL and no collapse.

    Args:
        mel_weight: lambda_mel, above 0.
        kl_weight: lambda_kl.
        kl_free_bits: See `gaussian_kl`.
    """

    def __init__(self, *, mel_weight: float, kl_weight: float, kl_free_bits: float = 0.0) -> None:
        super().__init__()
        self._mel_weight = mel_weight
        self._kl_weight, self._kl_free_bits = kl_weight, kl_free_bits

    def forward(
        self, reconstruction_BCTM: Tensor, target_BCTM: Tensor, mean: Tensor, logvar: Tensor | None
    ) -> LossTerms:
        """Returns the terms of one micro-batch.

        Args:
            reconstruction_BCTM: [B,C,T,M], any float type.
            target_BCTM: Same shape: the clip's own spectrogram.
            mean: [B,channels,...] posterior mean.
            logvar: Posterior log-variance, the mean's shape or broadcastable to it; None for a deterministic
                autoencoder.

        Raises:
            DataError: If the shapes differ.
        """
        if reconstruction_BCTM.shape != target_BCTM.shape:
            raise DataError(
                f"mel loss: both spectrograms must have one shape, got {list(reconstruction_BCTM.shape)} and "
                f"{list(target_BCTM.shape)}. Crop the reconstruction to the original."
            )
        total = LossSum()
        with no_autocast(reconstruction_BCTM):
            distance = (widened(reconstruction_BCTM) - widened(target_BCTM)).abs().mean()
            total.add("loss/mel", self._mel_weight, distance)
            if logvar is not None:
                kl = partial(gaussian_kl, mean, logvar, reduction="per_position")
                add_kl(total, self._kl_weight, kl, free_bits=self._kl_free_bits)
        for name, value in latent_statistics(mean, logvar).items():
            total.measure(name, value)
        return total.finish()
