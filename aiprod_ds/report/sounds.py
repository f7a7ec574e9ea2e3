"""What an audio model does, to see and to hear: spectrograms of originals over reconstructions, and WAV files.

Shapes: N clips, C channels, L samples.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from aiprod_ds.errors import DataError

_FFT_SIZE, _HOP = 1024, 256
_RANGE_DB = 80.0


def save_spectrograms(original_NCL: Tensor, reconstruction_NCL: Tensor, path: Path, *, sample_rate_hz: int, title: str) -> None:
    """Writes a PNG with one column per clip: log-magnitude STFT of the original over that of the reconstruction.

    Both pictures of a clip share one colour scale: 80 dB down from the loudest point of the original. Channels are averaged.

    Args:
        original_NCL: [N, C, L] in [-1, 1].
        reconstruction_NCL: The same shape.
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
    num_clips, _, num_samples = original_NCL.shape
    figure = Figure(figsize=(max(5.0, 0.9 + 3.4 * num_clips), 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, num_clips, sharex=True, sharey=True, squeeze=False)
    extent = (0.0, num_samples / sample_rate_hz, 0.0, sample_rate_hz / 2000)
    for clip in range(num_clips):
        original_FT = _decibels(original_NCL[clip])
        loudest = float(original_FT.max())
        for row, levels_FT in enumerate((original_FT, _decibels(reconstruction_NCL[clip]))):
            image = axes[row, clip].imshow(
                levels_FT.numpy(),
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap="magma",
                vmin=loudest - _RANGE_DB,
                vmax=loudest,
            )
        axes[0, clip].set_title(f"clip {clip + 1}", fontsize=10)
        axes[1, clip].set_xlabel("time [s]")
        figure.colorbar(image, ax=axes[:, clip], label="level [dB]" if clip == num_clips - 1 else "", pad=0.02)
    for row, name in enumerate(("original", "reconstruction")):
        axes[row, 0].set_ylabel(f"{name}\nfrequency [kHz]")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path)


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
        raise DataError(f"{path}: samples must be finite, got NaN or infinity from the model. Nothing was written.")
    samples_LC = (sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(samples_LC.astype(np.dtype("<i2")).tobytes())


def _decibels(sound_CL: Tensor) -> Tensor:
    """Returns the level [frequencies, times] in dB of full scale, averaged over channels in power; -120 dB is the floor."""
    sound = sound_CL.detach().to("cpu", torch.float32).nan_to_num()
    window = torch.hann_window(_FFT_SIZE)
    spectrum = torch.stft(sound, _FFT_SIZE, _HOP, window=window, return_complex=True, pad_mode="constant")
    power = (spectrum.abs() / (window.sum() / 2)).square().mean(dim=0)
    return 10 * torch.log10(power.clamp_min(1e-12))
