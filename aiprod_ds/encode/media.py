"""The pictures and the sound of one clip for encoding: its middle, in a shape, and exactly the same span of
time in both.

Owns where a clip begins and how its sound is cut and filled up; decoding is `aiprod_ds.decode`'s. Runs in
worker processes. Shapes: C channels, T frames, H height, W width, N samples.
"""

from __future__ import annotations

from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from aiprod_ds.codec.encoders import AudioForm
from aiprod_ds.data.latents import LatentShape
from aiprod_ds.data.loudness import normalized
from aiprod_ds.decode.audio import fit_sound
from aiprod_ds.decode.fit import fit_clip
from aiprod_ds.decode.pixels import BLACK, Color
from aiprod_ds.decode.probe import SoundLevel
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.decode.resampling import input_window, resampled_length
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.decode.video import decode_clip, max_start_seconds
from aiprod_ds.errors import DataError

# An MP3 or AAC frame is 26 ms at most, so that encoders may end a sound up to two of them before the
# pictures.
_MISSING_TOLERANCE_SECONDS = 0.1
_EPSILON = 1e-6


def clip_rate_hz(record: MediaRecord, shape: LatentShape) -> float:
    """Returns the frames per second of a clip of that shape."""
    return record.fps if shape.frame_rate_hz is None else shape.frame_rate_hz


def start_seconds(record: MediaRecord, shape: LatentShape) -> float:
    """Returns when the clip in the middle of the media begins, on a frame of the media.

    Raises:
        DataError: If the media is too short.
    """
    latest_frame = int(
        max_start_seconds(record, shape.frames, clip_rate_hz(record, shape)) * record.fps + _EPSILON
    )
    return record.start_seconds + latest_frame // 2 / record.fps


def read_pictures(
    root: Path, record: MediaRecord, shape: LatentShape, *, background: Color = BLACK
) -> Tensor:
    """Returns the clip's frames, [3,T,H,W] float32 in [-1,1], its centre cropped to the shape.

    Args:
        root: The manifest's.
        record: Of the media.
        shape: What is wanted.
        background: RGB behind transparent pixels.

    Raises:
        DataError: If the media is too short or cannot be decoded.
    """
    frames_THWC = decode_clip(
        root / record.path,
        start_seconds=start_seconds(record, shape),
        num_frames=shape.frames,
        frame_rate_hz=clip_rate_hz(record, shape),
        background=background,
        crop=record.crop,
        end_seconds=record.end_seconds,
    )
    return fit_clip(
        frames_THWC,
        height=shape.height,
        width=shape.width,
        seed=None,
        flip=False,
        displayed=(record.height, record.width),
    )


def read_sound(
    root: Path,
    record: MediaRecord,
    shape: LatentShape,
    form: AudioForm,
    *,
    fill_with_silence: bool,
    level: SoundLevel | None = None,
) -> Tensor:
    """Returns the sound of the clip's span, [C,N] float32 in [-1,1].

    The span is frames / rate seconds from the first frame on, in the clock of the pictures. N is the multiple
    of the hop that is nearest to it: latents come whole, so the sound ends within half a latent of the last
    frame. What the file's sound does not reach is silent, as in a player. A sound in a file of its own begins
    with the first picture.

    Args:
        form: What the audio encoder takes.
        fill_with_silence: Whether more than 0.1 s may be filled up, or all of it.
        level: Takes in what the file has of the span, before it is resampled.

    Raises:
        DataError: If the sound is missing and may not be, is damaged or has channels without a place.
    """
    num_samples = form.num_latents(shape.frames / clip_rate_hz(record, shape)) * form.hop
    path = root / (record.audio_path or record.path)
    if record.audio_rate_hz is None:
        if fill_with_silence:
            return torch.zeros(form.channels, num_samples)
        raise DataError(
            f"{path}: must have sound, got none. Set audio.missing_sound to silence or remove the clip."
        )
    try:
        delay_seconds = _delay_seconds(path) if record.audio_path is None else 0.0
        begin = round((start_seconds(record, shape) - delay_seconds) * form.sample_rate_hz)
        wave_CN, missing = _part(path, begin, num_samples, form, level)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be decodable sound, got: {error}. Repair or remove the file."
        ) from error
    if missing > _MISSING_TOLERANCE_SECONDS * form.sample_rate_hz and not fill_with_silence:
        raise DataError(
            f"{path}: must have sound for all of its pictures, got {missing / form.sample_rate_hz:.3f} s "
            "less. "
            "Set audio.missing_sound to silence or remove the clip."
        )
    if form.loudness_lufs is None:
        return wave_CN
    return normalized(wave_CN, sample_rate_hz=form.sample_rate_hz, target_lufs=form.loudness_lufs)


def _delay_seconds(path: Path) -> float:
    """Returns how long after the first picture the first sample is heard."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        first = next(container.decode(audio), None)
        if first is None or first.time is None or video.time_base is None:
            return 0.0
        return float(first.time) - float((video.start_time or 0) * video.time_base)


def _part(
    path: Path, begin: int, num_samples: int, form: AudioForm, level: SoundLevel | None
) -> tuple[Tensor, int]:
    """Returns samples `begin` to `begin + num_samples`, and how many of them the file does not have."""
    early = min(num_samples, max(0, -begin))
    wanted, begin = num_samples - early, max(0, begin)
    with SoundFile(path) as sound:
        own_hz, layout = sound.sample_rate_hz, sound.layout
        window = input_window(begin, wanted, from_hz=own_hz, to_hz=form.sample_rate_hz)
        read_CN = sound.read(window.start, window.stop)
    if level is not None and read_CN.size:
        level.add(read_CN)
    window_CN = torch.from_numpy(read_CN)
    held = resampled_length(window.start + window_CN.shape[1], from_hz=own_hz, to_hz=form.sample_rate_hz)
    late = min(wanted, max(0, begin + wanted - held))
    filled_CN = F.pad(window_CN, (0, len(window) - window_CN.shape[1]))
    wave_CN = fit_sound(
        filled_CN,
        begin,
        wanted,
        from_hz=own_hz,
        to_hz=form.sample_rate_hz,
        channels=form.channels,
        where=str(path),
        layout=layout,
    )
    return F.pad(wave_CN, (early, 0)), early + late
