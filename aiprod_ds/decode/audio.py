"""From a file to the samples of a training clip: decodes an exact part, then converts channels and rate.

Owns samples and time; what a file holds is `probe.py`'s, what is asked is `data/audio_dataset.py`'s. PyAV's
errors end here. Shapes: C channels, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import torch
from torch import Tensor

from aiprod_ds.decode.downmix import check_layout, with_channels
from aiprod_ds.decode.resampling import check_rates, input_window, resample_window, resampled_length
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.errors import DataError


def decode_audio(
    path: Path, *, start_sample: int, num_samples: int, sample_rate_hz: int, channels: int
) -> Tensor:
    """Decodes a part of a sound file or of a video's sound.

    The part is the same part of the whole file decoded and resampled, wherever it starts: bit for bit at the
    file's own rate, within 2e-6 at another.

    Args:
        path: Any container and codec that FFmpeg decodes; its first audio stream is taken.
        start_sample: The first sample, counted at `sample_rate_hz` from the file's first.
        num_samples: How many samples, at least 1, at `sample_rate_hz`.
        sample_rate_hz: Rate of the result; that of the file needs no resampling.
        channels: 1 averages a stereo file, 2 repeats a mono file; more are mixed down (`downmix.py`).

    Returns:
        [channels,num_samples] float32 in [-1,1]; what a codec or the resampler puts beyond 1 is clipped.

    Raises:
        DataError: If the file holds no sound or channels without a place, the part is damaged or not finite,
            the file ends too early, or its rate has no simple ratio to `sample_rate_hz`. A codec without
            redundancy decodes some damage to wrong samples, which nobody can see.
    """
    wave_CN, window, own_hz, layout = _read(path, start_sample, num_samples, sample_rate_hz)
    if wave_CN.shape[1] < len(window):
        total = resampled_length(window.start + wave_CN.shape[1], from_hz=own_hz, to_hz=sample_rate_hz)
        if total < start_sample + num_samples:
            raise DataError(
                f"{path}: must have {num_samples} samples at {sample_rate_hz} Hz from sample {start_sample} "
                "on, "
                f"got {max(0, total - start_sample)}. Ask for fewer samples, start earlier or remove the "
                "file."
            )
    return fit_sound(
        wave_CN,
        start_sample,
        num_samples,
        from_hz=own_hz,
        to_hz=sample_rate_hz,
        channels=channels,
        where=str(path),
        layout=layout,
    )


def decode_beginning(path: Path, *, num_samples: int, sample_rate_hz: int, channels: int) -> Tensor:
    """Decodes the beginning of a sound file or of a video's sound, with silence where it ends early.

    Returns:
        [channels,num_samples] float32 in [-1,1].

    Raises:
        DataError: As `decode_audio`, but for a sound that is too short.
    """
    wave_CN, window, own_hz, layout = _read(path, 0, num_samples, sample_rate_hz)
    padded_CN = torch.nn.functional.pad(wave_CN, (0, len(window) - wave_CN.shape[1]))
    return fit_sound(
        padded_CN,
        0,
        num_samples,
        from_hz=own_hz,
        to_hz=sample_rate_hz,
        channels=channels,
        where=str(path),
        layout=layout,
    )


def fit_sound(
    window_CN: Tensor,
    start: int,
    num_samples: int,
    *,
    from_hz: int,
    to_hz: int,
    channels: int,
    where: str,
    layout: Sequence[str] | None = None,
) -> Tensor:
    """Brings a part of a sound to the rate and channels that a model takes.

    Args:
        window_CN: [C,N] floating: the samples of `resampling.input_window`.
        start: First sample of the result, counted at `to_hz`.
        num_samples: Length of the result, at `to_hz`.
        from_hz: Rate of `window_CN`.
        to_hz: Rate of the result.
        channels: 1 averages stereo, 2 repeats mono.
        where: How messages name the sound.
        layout: Names of its channels, which say how more than two are mixed down.

    Returns:
        [channels,num_samples] float32 in [-1,1], contiguous.

    Raises:
        DataError: If a sample is not finite, channels have no place, or the rates have no simple ratio.
    """
    # Before the clamp, which would turn infinity into full scale.
    if not bool(window_CN.isfinite().all()):
        raise DataError(f"{where}: samples must be finite, got NaN or infinity. Repair or remove it.")
    try:
        check_layout(window_CN.shape[0], layout)
        check_rates(from_hz=from_hz, to_hz=to_hz)
    except DataError as error:
        raise DataError(f"{where}: {error}.") from error
    wave_CN = resample_window(
        with_channels(window_CN.float(), channels, layout), start, num_samples, from_hz=from_hz, to_hz=to_hz
    )
    return wave_CN.clamp(-1.0, 1.0).contiguous()


def _read(
    path: Path, start: int, num_samples: int, sample_rate_hz: int
) -> tuple[Tensor, range, int, tuple[str, ...]]:
    """Returns the file's samples of a part [C,N], fewer where it ends; their window, rate and channels."""
    try:
        with SoundFile(path) as sound:
            own_hz, layout = sound.sample_rate_hz, sound.layout
            window = input_window(start, num_samples, from_hz=own_hz, to_hz=sample_rate_hz)
            wave_CN = torch.from_numpy(sound.read(window.start, window.stop))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be decodable sound, got: {error}. Repair or remove the file."
        ) from error
    return wave_CN, window, own_hz, layout
