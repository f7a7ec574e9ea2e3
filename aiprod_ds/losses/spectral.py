"""SpectralLoss: how far apart two waveforms are in magnitude and log-magnitude, at several time and frequency
resolutions.

Owns the STFT magnitude and the distance. Called by `audio.py`; `mel.py` uses the magnitude. Shapes: B batch,
C channels, N samples, F frequency bins, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aiprod_ds.config.losses import SpectralConfig
from aiprod_ds.losses.precision import no_autocast
from aiprod_ds.losses.waveform import WavePair, aligned_pair, frame_mean

_POWER_EPSILON = 1e-8  # keeps the gradient of the root finite (zero) in silence


class SpectralLoss(nn.Module):
    """Magnitude plus log-magnitude L1 over STFTs, in fp32.

        S(x) = sqrt(re^2 + im^2 + 1e-8)
        L = mean_r [ mean|S_r(x) - S_r(y)| + mean|log(S_r(x) + eps) - log(S_r(y) + eps)| ]

    with r over `config.fft_sizes`, hop n/4, periodic Hann window, frames centred, zeros beyond the ends;
    `log1p` replaces log(S + eps) by log(1 + S). Stereo adds (L+R)/sqrt(2) and (L-R)/sqrt(2) to the channels
    that are averaged.

    Worked number: silence against one sample of height 1 in the middle of 1024, fft size 256: the sample has
    window weight 1, 0.5 and 0.5 in three of 17 frames, alike in all bins, so the magnitude term is (1 + 0.5 +
    0.5 - 3e-4)/17 = 0.117629 and the log term (log(1.00001/1.1e-4) + 2*log(0.50001/1.1e-4))/17 = 1.526991; L
    = 1.644620.

    Source: losses of stable-audio-tools (resolutions, after Yamamoto et al. 2020), EnCodec and DAC (both
    terms, epsilon). Deviations: no spectral convergence term; zeros instead of reflection at the ends, so
    that a clip in a padded batch gives the same number as alone and clips may be shorter than the window; sum
    and difference keep the energy, so that the magnitude of a centred sound is not counted twice.

    Args:
        config: Resolutions, logarithm, stereo.
    """

    def __init__(self, config: SpectralConfig | None = None) -> None:
        super().__init__()
        self.config = config or SpectralConfig()

    def forward(
        self, reconstruction: Tensor, target: Tensor, *, num_samples: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the distance, 0-dim fp32 (fp64 for fp64 inputs).

        Args:
            reconstruction: [B,C,N] or [B,N] in [-1,1], any float type, at least as long as the target. Has
                the gradient.
            target: [B,C,N] or [B,N].
            num_samples: True length of each clip; what lies beyond has no effect.

        Raises:
            DataError: If the shapes do not fit.
        """
        with no_autocast(reconstruction):
            pair = aligned_pair(reconstruction, target, num_samples)
            if self.config.sum_difference and pair.target.shape[1] == 2:
                pair = _with_sum_and_difference(pair)
            return torch.stack([self._resolution(pair, size) for size in self.config.fft_sizes]).mean()

    def _resolution(self, pair: WavePair, fft_size: int) -> Tensor:
        y_BCFT, x_BCFT = (magnitude(wave, fft_size) for wave in (pair.reconstruction, pair.target))
        difference_BCFT = (y_BCFT - x_BCFT).abs() + (self._log(y_BCFT) - self._log(x_BCFT)).abs()
        return frame_mean(difference_BCFT, pair, fft_size // 4)

    def _log(self, magnitude_BCFT: Tensor) -> Tensor:
        if self.config.log == "log1p":
            return torch.log1p(magnitude_BCFT)
        return torch.log(magnitude_BCFT + self.config.log_epsilon)


def magnitude(wave_BCN: Tensor, fft_size: int) -> Tensor:
    """Returns sqrt(re^2 + im^2 + 1e-8) of the STFT, [B, C, fft_size/2 + 1, 1 + N // (fft_size/4)], in the
    input's type.

    Not normalised by the window: a sine of amplitude a at the centre of a bin reads a * fft_size/4 there.
    """
    spectrum = torch.stft(
        wave_BCN.flatten(0, 1),
        n_fft=fft_size,
        hop_length=fft_size // 4,
        window=torch.hann_window(fft_size, dtype=wave_BCN.dtype, device=wave_BCN.device),
        pad_mode="constant",
        return_complex=True,
    )
    # Not `spectrum.abs()`: its root would stand before the epsilon is added.
    power = torch.view_as_real(spectrum).square().sum(dim=-1)
    return torch.unflatten((power + _POWER_EPSILON).sqrt(), 0, wave_BCN.shape[:2])


def _with_sum_and_difference(pair: WavePair) -> WavePair:
    waves = [_four_channels(wave_BCN) for wave_BCN in (pair.reconstruction, pair.target)]
    return WavePair(reconstruction=waves[0], target=waves[1], num_samples=pair.num_samples)


def _four_channels(wave_BCN: Tensor) -> Tensor:
    left, right = wave_BCN.unbind(dim=1)
    return torch.stack([left, right, (left + right) * 0.5**0.5, (left - right) * 0.5**0.5], dim=1)
