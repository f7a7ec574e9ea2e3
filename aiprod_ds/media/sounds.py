"""What an audio model does, to see and to hear: spectrograms of originals over reconstructions, and WAV
files.

Shapes: N clips, C channels, L samples.
"""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from aiprod_ds.errors import DataError

_FFT_SIZE, _HOP = 1024, 256
_RANGE_DB = 80.0
_DECIBELS_PER_NEPER = 20 / math.log(10)


def save_spectrograms(
    original_NCL: Tensor, reconstruction_NCL: Tensor, path: Path, *, sample_rate_hz: int, title: str
) -> None:
    """Writes a PNG with one column per clip: log-magnitude STFT of the original over that of the
    reconstruction.

    Both pictures of a clip share one colour scale: 80 dB down from the loudest point of the original.
    Channels are averaged.

    Args:
        original_NCL: [N, C, L] in [-1, 1].
        reconstruction_NCL: Same shape; may be louder than the scale shows.
        path: The PNG; its folder must exist.
        sample_rate_hz: Samples per second.
        title: Printed on top.

    Raises:
        ValueError: If the shapes differ.
    """
    if original_NCL.shape != reconstruction_NCL.shape or original_NCL.ndim != 3:
        raise ValueError(
            f"spectrograms: both sounds must be [N, C, L] of one shape, got {tuple(original_NCL.shape)} and "
            f"{tuple(reconstruction_NCL.shape)}. Crop the reconstruction to the original."
        )
    pairs = [
        (_decibels(original), _decibels(reconstruction))
        for original, reconstruction in zip(original_NCL, reconstruction_NCL, strict=True)
    ]
    extent = (0.0, original_NCL.shape[2] / sample_rate_hz, 0.0, sample_rate_hz / 2000)
    _save_columns(
        pairs, path, title=title, extent=extent, labels=("time [s]", "frequency [kHz]", "level [dB]")
    )


def save_mels(original_NCTM: Tensor, reconstruction_NCTM: Tensor, path: Path, *, title: str) -> None:
    """Writes a PNG with one column per clip: the log-mel spectrogram of the original over that of the
    reconstruction.

    Both pictures of a clip share one colour scale: 80 dB down from the loudest point of the original.
    Channels are averaged.

    Args:
        original_NCTM: [N, C, T, M] natural logarithms of mel magnitudes.
        reconstruction_NCTM: Same shape; may be louder than the scale shows.
        path: The PNG; its folder must exist.
        title: Printed on top.

    Raises:
        ValueError: If the shapes differ.
    """
    if original_NCTM.shape != reconstruction_NCTM.shape or original_NCTM.ndim != 4:
        raise ValueError(
            f"spectrograms: both must be [N, C, T, M] of one shape, got {tuple(original_NCTM.shape)} and "
            f"{tuple(reconstruction_NCTM.shape)}. Crop the reconstruction to the original."
        )
    both = [
        mels.detach().to("cpu", torch.float32).nan_to_num().mean(1) * _DECIBELS_PER_NEPER
        for mels in (original_NCTM, reconstruction_NCTM)
    ]
    pairs = [
        (original_TM.T, reconstruction_TM.T) for original_TM, reconstruction_TM in zip(*both, strict=True)
    ]
    extent = (0.0, float(original_NCTM.shape[2]), 0.0, float(original_NCTM.shape[3]))
    _save_columns(pairs, path, title=title, extent=extent, labels=("frame", "mel band", "level [dB]"))


def save_wav(sound_CL: Tensor, path: Path, *, sample_rate_hz: int) -> None:
    """Writes 16-bit PCM; samples outside [-1, 1] are clipped.

    Args:
        sound_CL: [C, L] in [-1, 1].
        path: The WAV file; its folder must exist.
        sample_rate_hz: Samples per second.

    Raises:
        DataError: If a sample is not finite; nothing is written.
    """
    sound = sound_CL.detach().to("cpu", torch.float32)
    if not bool(sound.isfinite().all()):
        raise DataError(
            f"{path}: samples must be finite, got NaN or infinity from the model. Nothing was written."
        )
    samples_LC = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(samples_LC.astype(np.dtype("<i2")).tobytes())


def _save_columns(
    pairs: Sequence[tuple[Tensor, Tensor]],
    path: Path,
    *,
    title: str,
    extent: tuple[float, float, float, float],
    labels: tuple[str, str, str],
) -> None:
    """Draws pairs (original, reconstruction) [frequencies, times] in dB; `labels` are of time, frequency and
    colour."""
    figure = Figure(figsize=(max(5.0, 0.9 + 3.4 * len(pairs)), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
    for clip, pair in enumerate(pairs):
        loudest = float(pair[0].max())
        for row, levels_FT in enumerate(pair):
            scale = {"vmin": loudest - _RANGE_DB, "vmax": loudest}
            image = axes[row, clip].imshow(
                levels_FT.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma", **scale
            )
        axes[0, clip].set_title(f"clip {clip + 1}", fontsize=10)
        axes[1, clip].set_xlabel(labels[0])
        figure.colorbar(image, ax=axes[:, clip], label=labels[2] if clip == len(pairs) - 1 else "", pad=0.02)
    for row, name in enumerate(("original", "reconstruction")):
        axes[row, 0].set_ylabel(f"{name}\n{labels[1]}")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path)


def _decibels(sound_CL: Tensor) -> Tensor:
    """Returns the level [frequencies, times] in dB of full scale, averaged over channels in power; -120 dB is
    the floor."""
    sound = sound_CL.detach().to("cpu", torch.float32).nan_to_num()
    window = torch.hann_window(_FFT_SIZE)
    spectrum = torch.stft(sound, _FFT_SIZE, _HOP, window=window, return_complex=True, pad_mode="constant")
    power = (spectrum.abs() / (window.sum() / 2)).square().mean(dim=0)
    return 10 * torch.log10(power.clamp_min(1e-12))
