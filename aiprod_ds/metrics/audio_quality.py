"""How close reconstructed sounds are to their originals: mel distance, STFT distance, SI-SDR and, where it is
asked for, ViSQOL.

Owns the measures of one clip; measured, never trained. The distances follow the protocol of DAC's evaluation
and not that of our losses, so that figures compare with published ones. Called by evaluation. Shapes: B
batch, C channels, N samples, F bins or bands, T frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.quality_sums import Finding, QualitySums, clip_names

SI_SDR_CEILING_DB = 100.0  # an exact copy has an infinite ratio, which no mean survives
SI_SDR_FLOOR_DB = -100.0  # a silent reconstruction has nothing of the original
SHORTEST_MEASURED = (
    1025  # samples: half of the longest window, beyond which its reflected ends reach, and one
)
_FLOOR = 1e-5
_BANDS_OF_WINDOW = {2048: 150, 512: 80}
_MEASURES = ("mel_distance", "stft_distance", "si_sdr_db")


class AudioQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its length.

        D(S) = sum over windows 2048 and 512 of mean|S(x) - S(y)| +
               mean|log10 max(S(x), 1e-5)^2 - log10 max(S(y), 1e-5)^2|
        stft_distance: S the STFT magnitude (hop w/4, periodic Hann window, reflected ends)
        mel_distance:  S its Slaney mel bands, 150 and 80 of them, 0 Hz to half the sample rate
        si_sdr_db:     scale-invariant signal-to-distortion ratio, means removed, channels of a clip as one
                       signal, from -100 dB (a silent reconstruction) to 100 dB

    The distances depend on the sample rate: compare them at the same rate only.

    An original of digital silence is not judged: it has no signal for a ratio, and its distances would say
    how far noise that nobody hears lies above the floor of a logarithm, which outweighs all other clips. One
    that is shorter than the window's half has no distances.

    Worked number: y = x/10, loud everywhere: each logarithm differs by 2, so D is 4 plus 0.9 of the mean
    magnitudes; SI-SDR is at the ceiling, since scale does not count.

    Source: Kumar et al. 2023 (DAC), `scripts/evaluate.py` and the defaults of `dac/nn/loss.py`.

    Args:
        sample_rate_hz: Of both sounds; the mel bands end at half of it.
        opinion: Predicts what listeners think of a reconstruction [C,N], the original first, as `visqol`;
            None leaves the measure out.
    """

    def __init__(
        self, *, sample_rate_hz: int, opinion: Callable[[Tensor, Tensor], Finding] | None = None
    ) -> None:
        super().__init__("audio", (*_MEASURES, *(("visqol",) if opinion is not None else ())))
        self._opinion = opinion
        self._filters_MF = {
            size: _mel_filters(size, bands, sample_rate_hz) for size, bands in _BANDS_OF_WINDOW.items()
        }

    @torch.no_grad()
    def update(
        self,
        original_BCN: Tensor,
        reconstruction_BCN: Tensor,
        *,
        num_samples: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Adds a batch of clips.

        Args:
            original_BCN: [B,C,N] in [-1,1], any float type.
            reconstruction_BCN: [B,C,N'] with N' at least N; cropped to N.
            num_samples: True length of each clip; None: all N.
            names: Of the clips, for what is said of them.

        Raises:
            DataError: If the shapes do not fit.
        """
        lengths = _checked_lengths(original_BCN, reconstruction_BCN, num_samples)
        for name, original_CN, reconstruction_CN, length in zip(
            clip_names(names, len(lengths)), original_BCN, reconstruction_BCN, lengths, strict=True
        ):
            found = self._clip(original_CN[:, :length].float(), reconstruction_CN[:, :length].float())
            self._add(name, found)

    def compute(self) -> dict[str, float]:
        """Returns the mean of every measure that could judge a clip.

        Raises:
            DataError: If no clip was added.
        """
        return self._means()

    def _clip(self, x_CN: Tensor, y_CN: Tensor) -> dict[str, Finding]:
        if bool((x_CN - x_CN.mean()).abs().max() == 0):  # NaN is no silence
            return dict.fromkeys(self._measures, "digital silence")
        found: dict[str, Finding] = {"si_sdr_db": _si_sdr_db(x_CN, y_CN)}
        if x_CN.shape[1] < SHORTEST_MEASURED:
            found |= dict.fromkeys(("mel_distance", "stft_distance"), f"under {SHORTEST_MEASURED} samples")
        else:
            found |= self._distances(x_CN, y_CN)
        if self._opinion is not None:
            found["visqol"] = self._opinion(x_CN, y_CN)
        return found

    def _distances(self, x_CN: Tensor, y_CN: Tensor) -> dict[str, float]:
        mel_distance = stft_distance = 0.0
        for size, filters_MF in self._filters_MF.items():
            x_CFT, y_CFT = _magnitude(x_CN, size), _magnitude(y_CN, size)
            stft_distance += _distance(x_CFT, y_CFT)
            mel_distance += _distance(filters_MF.to(x_CN) @ x_CFT, filters_MF.to(x_CN) @ y_CFT)
        return {"mel_distance": mel_distance, "stft_distance": stft_distance}


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

    if bool((y_CN - y_CN.mean()).abs().max() == 0):
        return SI_SDR_FLOOR_DB  # where torchmetrics has 0 dB, since it adds an epsilon to both sides of 0 / 0
    # fp64, because at 60 dB the distortion is a difference of nearly equal fp32 numbers.
    ratio = scale_invariant_signal_distortion_ratio(
        y_CN.flatten().double(), x_CN.flatten().double(), zero_mean=True
    )
    return max(min(float(ratio), SI_SDR_CEILING_DB), SI_SDR_FLOOR_DB)


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
    if len(lengths) != shape[0] or not all(0 < length <= shape[2] for length in lengths):
        raise DataError(
            f"audio quality: needs {shape[0]} lengths from 1 to {shape[2]}, got {lengths}. Evaluate longer "
            "clips."
        )
    return lengths
