"""How close reconstructed sounds are to their originals: mel distance, STFT distance and SI-SDR.

Owns the measures of one clip; measured, never trained. The distances follow the protocol of DAC's evaluation
and not that of our losses, so that figures compare with published ones. Called by evaluation. Shapes: B
batch, C channels, N samples, F bins or bands, T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.quality_sums import QualitySums

SI_SDR_CEILING_DB = 100.0  # an exact copy has an infinite ratio, which no mean survives
_FLOOR = 1e-5
_BANDS_OF_WINDOW = {2048: 150, 512: 80}
_FIELDS = ("clips", "mel_distance", "stft_distance", "sounding_clips", "si_sdr_db")


class AudioQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its length.

        D(S) = sum over windows 2048 and 512 of mean|S(x) - S(y)| +
               mean|log10 max(S(x), 1e-5)^2 - log10 max(S(y), 1e-5)^2|
        stft_distance: S the STFT magnitude (hop w/4, periodic Hann window, reflected ends)
        mel_distance:  S its Slaney mel bands, 150 and 80 of them, 0 Hz to half the sample rate
        si_sdr_db:     scale-invariant signal-to-distortion ratio, means removed, channels of a clip as one
                       signal, at most 100 dB; silent originals have none and are left out

    The distances depend on the sample rate: compare them at the same rate only.

    Worked number: y = x/10, loud everywhere: each logarithm differs by 2, so D is 4 plus 0.9 of the mean
    magnitudes; SI-SDR is at the ceiling, since scale does not count.

    Source: Kumar et al. 2023 (DAC), `scripts/evaluate.py` and the defaults of `dac/nn/loss.py`.

    Args:
        sample_rate_hz: Of both sounds; the mel bands end at half of it.
    """

    def __init__(self, *, sample_rate_hz: int) -> None:
        super().__init__("audio", _FIELDS)
        self._filters_MF = {
            size: _mel_filters(size, bands, sample_rate_hz) for size, bands in _BANDS_OF_WINDOW.items()
        }

    @torch.no_grad()
    def update(
        self, original_BCN: Tensor, reconstruction_BCN: Tensor, *, num_samples: Sequence[int] | None = None
    ) -> None:
        """Adds a batch of clips.

        Args:
            original_BCN: [B,C,N] in [-1,1], any float type.
            reconstruction_BCN: [B,C,N'] with N' at least N; cropped to N.
            num_samples: True length of each clip, more than 1024; None: all N.

        Raises:
            DataError: If the shapes do not fit or a clip is shorter than half the longest window.
        """
        lengths = _checked_lengths(original_BCN, reconstruction_BCN, num_samples)
        for original_CN, reconstruction_CN, length in zip(
            original_BCN, reconstruction_BCN, lengths, strict=True
        ):
            self._add(self._clip(original_CN[:, :length].float(), reconstruction_CN[:, :length].float()))

    def compute(self) -> dict[str, float]:
        """Returns `mel_distance`, `stft_distance` and, unless every original was silent, `si_sdr_db`.

        Raises:
            DataError: If no clip was added.
        """
        sums = self._totals()
        result = {name: sums[name] / sums["clips"] for name in ("mel_distance", "stft_distance")}
        if sums["sounding_clips"] > 0:
            result["si_sdr_db"] = sums["si_sdr_db"] / sums["sounding_clips"]
        return result

    def _clip(self, x_CN: Tensor, y_CN: Tensor) -> list[float]:
        mel_distance = stft_distance = 0.0
        for size, filters_MF in self._filters_MF.items():
            x_CFT, y_CFT = _magnitude(x_CN, size), _magnitude(y_CN, size)
            stft_distance += _distance(x_CFT, y_CFT)
            mel_distance += _distance(filters_MF.to(x_CN) @ x_CFT, filters_MF.to(x_CN) @ y_CFT)
        is_sounding = bool((x_CN - x_CN.mean()).abs().max() > 0)
        si_sdr = _si_sdr_db(x_CN, y_CN) if is_sounding else 0.0
        return [1.0, mel_distance, stft_distance, float(is_sounding), si_sdr]


def _distance(x: Tensor, y: Tensor) -> float:
    logs = [2 * magnitude.clamp(min=_FLOOR).log10() for magnitude in (x, y)]
    return float((x - y).abs().mean() + (logs[0] - logs[1]).abs().mean())


def _magnitude(wave_CN: Tensor, window_size: int) -> Tensor:
    window = torch.hann_window(window_size, device=wave_CN.device)
    return torch.stft(
        wave_CN, window_size, hop_length=window_size // 4, window=window, return_complex=True
    ).abs()


def _si_sdr_db(x_CN: Tensor, y_CN: Tensor) -> float:
    # loads all of torchmetrics, which takes over a second
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    # fp64, because at 60 dB the distortion is a difference of nearly equal fp32 numbers.
    ratio = scale_invariant_signal_distortion_ratio(
        y_CN.flatten().double(), x_CN.flatten().double(), zero_mean=True
    )
    return min(float(ratio), SI_SDR_CEILING_DB)


def _mel_filters(window_size: int, num_bands: int, sample_rate_hz: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # about bands without a bin: the protocol has them, and they count as 0
        filters_FM: Tensor = melscale_fbanks(
            window_size // 2 + 1,
            0.0,
            sample_rate_hz / 2,
            num_bands,
            sample_rate_hz,
            norm="slaney",
            mel_scale="slaney",
        )
    return filters_FM.T.contiguous()


def _checked_lengths(
    original: Tensor, reconstruction: Tensor, num_samples: Sequence[int] | None
) -> list[int]:
    shape, other = list(original.shape), list(reconstruction.shape)
    if len(shape) != 3 or len(other) != 3 or shape[:2] != other[:2] or other[2] < shape[2]:
        raise DataError(
            f"audio quality: sounds must be [B,C,N], the reconstruction at least as long, got {shape} and "
            f"{other}."
        )
    lengths = [shape[2]] * shape[0] if num_samples is None else [int(number) for number in num_samples]
    shortest = max(_BANDS_OF_WINDOW) // 2
    if len(lengths) != shape[0] or not all(shortest < length <= shape[2] for length in lengths):
        raise DataError(
            f"audio quality: needs {shape[0]} lengths above {shortest} (half a window) and up to "
            f"{shape[2]}, got {lengths}. "
            "Evaluate longer clips."
        )
    return lengths
