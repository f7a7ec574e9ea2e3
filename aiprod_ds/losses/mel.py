"""MelLoss: how far apart two waveforms are in log-mel bands, at several resolutions.

Owns the distance; the STFT is that of `spectral.py`, the filters are torchaudio's. Called by `audio.py`.
Shapes: B batch, C channels, N samples, F frequency bins, M mel bands, T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from aiprod_ds.config.losses import MelConfig
from aiprod_ds.losses.precision import no_autocast
from aiprod_ds.losses.spectral import magnitude
from aiprod_ds.losses.waveform import WavePair, aligned_pair, frame_mean

_MEL_FLOOR = 1e-5


class MelLoss(nn.Module):
    """L1 between log10-mel spectrograms, summed over resolutions, in fp32.

        L = sum_r mean|log10(max(M_r S_r(x), 1e-5)) - log10(max(M_r S_r(y), 1e-5))|

    with S as in SpectralLoss and M_r a Slaney filter bank from 0 to half the sample rate.

    Worked number: y = 10 * x, loud in every band, gives 1.0 per resolution: 7.0 with the default seven.

    Source: DAC's training configuration (windows 32 to 2048, 5 to 320 bands, power 1, log term only), where
    its weight is 15; the sum over resolutions is part of that convention. Deviations: zeros beyond the ends,
    as in SpectralLoss; bands too narrow for their FFT are left out of the mean instead of counting as zero.

    Args:
        sample_rate_hz: Of both waveforms; the bands end at half of it.
    """

    def __init__(self, config: MelConfig, *, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        pairs = zip(config.fft_sizes, config.num_bands, strict=True)
        # A plain dict and not buffers: a cast of the module around must not make the filters half precision.
        self._filters_MF = {size: _filters(size, bands, sample_rate_hz) for size, bands in pairs}

    def forward(
        self, reconstruction: Tensor, target: Tensor, *, num_samples: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the distance, 0-dim fp32 (fp64 for fp64 inputs). Arguments and errors are those of
        `SpectralLoss.forward`."""
        with no_autocast(reconstruction):
            pair = aligned_pair(reconstruction, target, num_samples)
            return torch.stack([self._resolution(pair, size) for size in self._filters_MF]).sum()

    def _resolution(self, pair: WavePair, fft_size: int) -> Tensor:
        y_BCMT, x_BCMT = (self._log_mel(wave, fft_size) for wave in (pair.reconstruction, pair.target))
        return frame_mean((y_BCMT - x_BCMT).abs(), pair, fft_size // 4)

    def _log_mel(self, wave_BCN: Tensor, fft_size: int) -> Tensor:
        filters_MF = self._filters_MF[fft_size].to(wave_BCN)
        return (filters_MF @ magnitude(wave_BCN, fft_size)).clamp(min=_MEL_FLOOR).log10()


def _filters(fft_size: int, num_bands: int, sample_rate_hz: int) -> Tensor:
    """Returns the bands that hold at least one bin, [M, F] fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the empty bands that are dropped below
        filters_FM = melscale_fbanks(
            fft_size // 2 + 1,
            0.0,
            sample_rate_hz / 2,
            num_bands,
            sample_rate_hz,
            norm="slaney",
            mel_scale="slaney",
        )
    filters_MF: Tensor = filters_FM.T
    return filters_MF[filters_MF.sum(dim=1) > 0].contiguous()
