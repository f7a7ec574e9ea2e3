"""Reads a file to its end, to find what is damaged behind its beginning; keeps nothing of it.

Owns what counts as whole; decoding is `frames.py`'s and `sound_file.py`'s. Called by the datasets, for
`check --read-all`.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from aiprod_ds.decode.frames import animation_frames, is_animated_webp, timed_frames
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.decode.video import STRICT_DECODING
from aiprod_ds.errors import DataError


def read_video_to_end(path: Path, *, frames: int) -> None:
    """Decodes every frame of a video or a picture.

    Args:
        path: The file.
        frames: As many as its record says.

    Raises:
        DataError: If a frame cannot be decoded or there are fewer.
    """
    try:
        count = _count_animation(path) if is_animated_webp(path) else _count_frames(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be a decodable video, got: {error}. Repair or remove the file."
        ) from error
    if count < frames:
        raise DataError(
            f"{path}: must have the {frames} frames that it states, got {count} that can be decoded. Repair "
            "or remove the file."
        )


def read_sound_to_end(path: Path, *, samples: int) -> None:
    """Decodes every sample of a sound file or of a video's sound.

    Args:
        path: The file.
        samples: As many as its record says, at its own rate.

    Raises:
        DataError: If one cannot be decoded or is not finite, or there are fewer.
    """
    try:
        count = _count_samples(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be a decodable sound, got: {error}. Repair or remove the file."
        ) from error
    if count < samples:
        raise DataError(
            f"{path}: must have the {samples} samples that it had, got {count} that can be decoded. Repair "
            "or remove the file."
        )


def _count_animation(path: Path) -> int:
    return sum(1 for _ in animation_frames(path))


def _count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = STRICT_DECODING
        return sum(1 for _ in timed_frames(container, stream, is_beginning=True))


def _count_samples(path: Path) -> int:
    count = 0
    with SoundFile(path) as sound:
        for piece in sound.pieces():
            if not np.isfinite(piece.wave).all():
                raise ValueError(f"NaN or infinity after sample {piece.start}")
            count = piece.start + piece.wave.shape[1]
    return count
