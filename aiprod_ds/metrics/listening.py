"""What listeners would think of a reconstructed sound, as ViSQOL predicts it.

Owns the way to the package `visqol-python`, which comes with the extra `perceptual`, and what it is given.
Called by `audio_quality.py`, and by the trainers for the check. Shapes: C channels, N samples.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from aiprod_ds.errors import ConfigError
from aiprod_ds.metrics.quality_sums import Finding

VISQOL_RATE_HZ = 48000  # what its audio mode was fitted at
VISQOL_SECONDS = 1.0  # a patch of 45 spectra takes 0.96 s
WORST_OPINION = 1.0
_INAUDIBLE = 1e-9  # what averaging in float64 leaves of channels that cancel, and of an offset


def has_visqol() -> bool:
    """Returns whether the package is installed; imports nothing."""
    return find_spec("visqol") is not None


class Visqol:
    """Mean opinion score of a reconstruction, 1 to about 4.73 for an exact copy, in audio mode.

    Channels are averaged and sounds resampled to 48 kHz. Level does not count: ViSQOL brings both sounds to
    the same. A silent reconstruction has the worst score, one that is not finite NaN; an original under a
    second is not judged.

    Source: Chinen et al. 2020 (ViSQOL v3), in the implementation of `visqol-python`.

    Args:
        sample_rate_hz: Of the sounds.

    Raises:
        ConfigError: If the package is not installed.
    """

    def __init__(self, *, sample_rate_hz: int) -> None:
        try:
            from visqol import VisqolApi  # an optional extra
        except ImportError as error:
            raise ConfigError(
                f"evaluation.measures.visqol: needs the package visqol-python, got {error}. Install the "
                "extra: pip install 'aiprod_ds[perceptual]', or set it to false."
            ) from error
        self._rate_hz = sample_rate_hz
        self._api: Any = VisqolApi()
        self._api.create(mode="audio")

    def __call__(self, original_CN: Tensor, reconstruction_CN: Tensor) -> Finding:
        """Returns the score of sounds of one length in [-1, 1], or why there is none."""
        if original_CN.shape[1] < VISQOL_SECONDS * self._rate_hz:
            return f"under {VISQOL_SECONDS:g} s"
        original_N, reconstruction_N = (
            wave_CN.detach().cpu().double().mean(0) for wave_CN in (original_CN, reconstruction_CN)
        )
        if not reconstruction_N.isfinite().all():
            return float("nan")
        if _is_silent(original_N):
            return "silent where channels are averaged"
        if _is_silent(reconstruction_N):
            return WORST_OPINION  # ViSQOL takes an offset for a sound
        sounds = (self._at_its_rate(wave_N) for wave_N in (original_N, reconstruction_N))
        return float(self._api.measure_from_arrays(*sounds, VISQOL_RATE_HZ).moslqo)

    def _at_its_rate(self, wave_N: Tensor) -> np.ndarray[Any, Any]:
        from torchaudio.functional import resample

        resampled_N: Tensor = resample(wave_N, self._rate_hz, VISQOL_RATE_HZ)
        return resampled_N.numpy()


def _is_silent(wave_N: Tensor) -> bool:
    return bool((wave_N - wave_N.mean()).abs().max() < _INAUDIBLE)
