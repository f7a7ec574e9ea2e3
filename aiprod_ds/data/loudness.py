"""How loud a clip is, and the gain that brings it to a wanted loudness.

Owns both measures and nothing about files. Called by `audio_dataset.py`. Shapes: C channels, N samples, F
frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ABSOLUTE_GATE_LUFS = -70.0  # what is quieter counts as silence in ITU-R BS.1770
_OFFSET_DB = -0.691  # makes a 997 Hz sine at full scale in one channel -3.01 LUFS


def level_db(wave_CN: Tensor) -> float:
    """Returns the root mean square over samples and channels in dB of full scale; minus infinity for silence.

    Worked number: a sine that fills [-1, 1] has -3.01 dB.
    """
    power = float(wave_CN.double().square().mean())
    return 10 * math.log10(power) if power > 0 else -math.inf


def loudness_lufs(wave_CN: Tensor, *, sample_rate_hz: int) -> float:
    """Returns the K-weighted loudness of a whole clip; minus infinity for silence.

        L = -0.691 + 10 log10(sum over channels of mean(k^2)),  k the K-weighted samples

    The weighting is applied to the power spectrum, as if the clip went on in a circle. Worked number: a 997
    Hz sine that fills [-1, 1] in one channel has -3.01 LUFS.

    Source: ITU-R BS.1770-5, annex 1. Deviation: no gating, because clips are about as short as its blocks of
    0.4 s.

    Args:
        wave_CN: [C,N] in [-1,1], mono or stereo.
        sample_rate_hz: Places the two filters on the frequencies.
    """
    num_samples = wave_CN.shape[1]
    spectrum_CF = torch.fft.rfft(wave_CN.double())
    # By Parseval; every frequency but 0 and half the rate stands for itself and its mirror image.
    power_F = spectrum_CF.abs().square().sum(dim=0) / num_samples**2
    power_F[1 : (num_samples + 1) // 2] *= 2
    frequencies_hz = torch.fft.rfftfreq(num_samples, d=1 / sample_rate_hz, dtype=torch.float64)
    power = float((power_F * _weighting(frequencies_hz, sample_rate_hz)).sum())
    return _OFFSET_DB + 10 * math.log10(power) if power > 0 else -math.inf


def normalized(wave_CN: Tensor, *, sample_rate_hz: int, target_lufs: float) -> Tensor:
    """Returns the clip at `target_lufs`, or as near as its peak allows without leaving [-1, 1]. Silence stays
    silence.

    Worked number: a clip of -26 LUFS with a peak of 0.2 gets a gain of 10 dB (3.16) for -16 LUFS; with a peak
    of 0.5 it is 2.
    """
    loudness = loudness_lufs(wave_CN, sample_rate_hz=sample_rate_hz)
    if loudness < ABSOLUTE_GATE_LUFS:
        return wave_CN
    gain = 10 ** ((target_lufs - loudness) / 20)
    return wave_CN * min(gain, 1 / float(wave_CN.abs().max()))


def _weighting(frequencies_hz: Tensor, sample_rate_hz: int) -> Tensor:
    """Returns the power response [F] of the two K-weighting filters: a high shelf of 4 dB and a high pass."""
    # Analogue forms of the standard's filters, which it gives as coefficients for 48 kHz only.
    shelf = _biquad(
        frequencies_hz,
        sample_rate_hz,
        center_hz=1681.974450955533,
        quality=0.7071752369554196,
        gain_db=3.999843853973347,
    )
    high_pass = _biquad(
        frequencies_hz, sample_rate_hz, center_hz=38.13547087602444, quality=0.5003270373238773, gain_db=None
    )
    return shelf * high_pass


def _biquad(
    frequencies_hz: Tensor, sample_rate_hz: int, *, center_hz: float, quality: float, gain_db: float | None
) -> Tensor:
    """Returns the power response of a second-order high shelf, or of a high pass without `gain_db`, by the
    bilinear transform."""
    warped = math.tan(math.pi * center_hz / sample_rate_hz)
    # s = j tan(pi f / rate) / warped is where the transform puts each frequency.
    s = (
        1j
        * torch.tan(math.pi * frequencies_hz.clamp(max=0.499999 * sample_rate_hz) / sample_rate_hz)
        / warped
    )
    denominator = s**2 + s / quality + 1
    if gain_db is None:
        # The standard's coefficients are not normalised: 1, -2, 1 over 1, -1.990, 0.990.
        numerator = s**2 * (1 + warped / quality + warped**2)
    else:
        high = 10 ** (gain_db / 20)
        numerator = high * s**2 + high**0.4996667741545416 * s / quality + 1
    return (numerator / denominator).abs().square()
