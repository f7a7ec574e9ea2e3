"""A part of a resampled sound from a part of the sound itself: the same samples as cutting the whole,
resampled file.

Owns which input samples an output needs and how they line up; the filter is torchaudio's. Called by
`audio.py` and `data/audio_dataset.py`. Shapes: C channels, N samples.

With rates in lowest terms from : to, output sample n stands at n * from / to in the input, so every `to`
outputs the pattern repeats `from` inputs later. A window that starts at a multiple of `from` therefore sees
the filter in the same phase as the whole file.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torchaudio.transforms import Resample

from aiprod_ds.errors import DataError

# resampy's "kaiser_best", as the documentation of torchaudio spells it: the stop band is below -100 dB.
_ZERO_CROSSINGS, _ROLLOFF, _BETA = 64, 0.9475937167399596, 14.769656459379492
# Elements of the filter bank. All usual rates need under 0.3 million; 11,024 to 44,100 Hz needs 32 million, 2
# s and 500 MB.
_MAX_FILTER_ELEMENTS = 2**22


def resampled_length(num_samples: int, *, from_hz: int, to_hz: int) -> int:
    """Returns how many whole samples `num_samples` at `from_hz` become: floor(n * to / from).

    Worked number: 48,000 samples at 48 kHz are 44,100 at 44.1 kHz.
    """
    return num_samples * to_hz // from_hz


def check_rates(*, from_hz: int, to_hz: int) -> None:
    """Checks that sounds can be resampled between two rates.

    Raises:
        DataError: If the ratio in lowest terms has such large numbers that its filters would not fit; names
            no file.
    """
    source, target = _lowest_terms(from_hz, to_hz)
    elements = target * (2 * _reach(source, target) + source)
    if elements > _MAX_FILTER_ELEMENTS:
        raise DataError(
            f"its sample rate must be a simple ratio to data.sample_rate_hz ({to_hz}), got {from_hz} Hz "
            f"({source}:{target}). "
            "Convert the file to 44,100, 48,000 or another common rate"
        )


def input_window(start: int, num_samples: int, *, from_hz: int, to_hz: int) -> range:
    """Returns the input samples that `num_samples` outputs from `start` on depend on; it may reach beyond the
    sound's end."""
    source, target = _lowest_terms(from_hz, to_hz)
    if source == target:
        return range(start, start + num_samples)
    reach = _reach(source, target)
    first_block = max(0, start // target - math.ceil(reach / source))
    return range(first_block * source, math.ceil((start + num_samples) * source / target) + reach + 1)


def resample_window(window_CN: Tensor, start: int, num_samples: int, *, from_hz: int, to_hz: int) -> Tensor:
    """Returns the outputs `start` to `start + num_samples` of the whole sound.

    Args:
        window_CN: [C,N] float32: the samples of `input_window`, fewer only where the sound ends.
        start: First output sample, counted in the resampled sound.
        num_samples: Output samples; the caller has checked that the sound has them.
        from_hz: Rate of the input.
        to_hz: Rate of the output; with equal rates the window is the result.

    Returns:
        [C,num_samples] float32. For any two windows, what they share differs by less than 2e-6 (sums in
        another order).
    """
    if from_hz == to_hz:
        return window_CN
    source, target = _lowest_terms(from_hz, to_hz)
    first = input_window(start, num_samples, from_hz=from_hz, to_hz=to_hz).start // source * target
    resampled_CN: Tensor = _filters(source, target)(window_CN)
    return resampled_CN[:, start - first : start - first + num_samples]


def _lowest_terms(from_hz: int, to_hz: int) -> tuple[int, int]:
    divisor = math.gcd(from_hz, to_hz)
    return from_hz // divisor, to_hz // divisor


def _reach(source: int, target: int) -> int:
    """Returns how many input samples the filter sees on each side."""
    return math.ceil(_ZERO_CROSSINGS * max(1.0, source / target) / _ROLLOFF)


@functools.cache
def _filters(source: int, target: int) -> nn.Module:
    with torch.no_grad():
        filters: nn.Module = Resample(
            source,
            target,
            resampling_method="sinc_interp_kaiser",
            lowpass_filter_width=_ZERO_CROSSINGS,
            rolloff=_ROLLOFF,
            beta=_BETA,
        )
    return filters
