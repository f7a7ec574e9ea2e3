"""Spectrograms of sounds for the page: pictures of the level over time and pitch, original and reconstruction
on one scale that the original's own levels set.

Reads 16-bit WAV files as the runs write them. Pitch goes up in octaves, because half of a linear scale shows
what is hardly heard.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image

_MAX_COLUMNS, _ROWS = 480, 160
_MAX_SECONDS = 60
_LOWEST_HZ = 50.0
_MAX_RANGE_DB, _MIN_RANGE_DB = 70.0, 30.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Levels in dB at the two ends of the colours."""

    low: float
    high: float

    @property
    def text(self) -> str:
        """What the colours mean, in words."""
        return f"{self.low:.0f} to {self.high:.0f} dB"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Levels:
    """The level in dB of full scale, [rows from the lowest pitch up, columns of time]."""

    decibels: Floats
    seconds: float
    lowest_hz: float
    highest_hz: float

    @property
    def axes_text(self) -> str:
        """The extent of both axes, in words."""
        return f"0 to {self.seconds:.2f} s, {self.lowest_hz:.0f} to {self.highest_hz:,.0f} Hz in octaves"

    def scale(self) -> Scale:
        """Returns the range from the loudest point down to where hardly anything is quieter, 30 to 70 dB
        wide."""
        high = float(self.decibels.max())
        low = float(np.quantile(self.decibels, 0.05))
        return Scale(low=min(max(low, high - _MAX_RANGE_DB), high - _MIN_RANGE_DB), high=high)

    def png(self, scale: Scale) -> bytes:
        """Returns the picture."""
        shares = np.clip((self.decibels - scale.low) / (scale.high - scale.low), 0, 1)
        pixels = (colormaps["magma"](shares[::-1])[..., :3] * 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).quantize(64).save(file, format="PNG", optimize=True)
        return file.getvalue()


def levels_of(path: Path) -> Levels | None:
    """Returns the levels of a WAV file's first minute; None if it is not 16-bit PCM, is damaged, or too short
    to have any."""
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                return None
            rate, channels = file.getframerate(), file.getnchannels()
            data = file.readframes(_MAX_SECONDS * rate)
    except (OSError, EOFError, wave.Error):
        return None
    whole = len(data) // (2 * channels) * 2 * channels
    sound: Floats = np.frombuffer(data[:whole], dtype="<i2").reshape(-1, channels).astype(np.float32)
    size = 1 << max(6, round(np.log2(max(rate, 1) * 0.046)))  # near 46 ms, a power of two
    if rate < 1000 or len(sound) < size:
        return None
    return Levels(
        decibels=_decibels(sound / np.float32(32768), rate, size),
        seconds=len(sound) / rate,
        lowest_hz=_LOWEST_HZ,
        highest_hz=rate / 2,
    )


def _decibels(sound_NC: Floats, rate: int, size: int) -> Floats:
    starts = np.linspace(0, len(sound_NC) - size, min(_MAX_COLUMNS, max(1, len(sound_NC) // (size // 8))))
    window = np.hanning(size).astype(np.float32)
    power = np.zeros((size // 2 + 1, len(starts)), dtype=np.float32)
    for column, start in enumerate(starts.astype(int)):
        spectrum = np.fft.rfft(sound_NC[start : start + size] * window[:, None], axis=0)
        power[:, column] = (np.abs(spectrum) ** 2).mean(axis=1) / (window.sum() / 2) ** 2
    edges = np.geomspace(_LOWEST_HZ, rate / 2, _ROWS)
    places = edges / (rate / 2) * (size // 2)
    below = np.minimum(places.astype(int), size // 2 - 1)
    share = (places - below).astype(np.float32)[:, None]
    rows = power[below] * (1 - share) + power[below + 1] * share
    levels: Floats = (10 * np.log10(np.maximum(rows, 1e-12))).astype(np.float32)
    return levels
