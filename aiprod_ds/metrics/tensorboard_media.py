"""Films and sounds in the forms that TensorBoard shows: animated GIF among the images, WAV among the audio.

TensorBoard plays no MP4. Its own `add_video` makes GIFs too, but with a package that nothing else here needs;
PyAV and Pillow are here anyway. Shapes: C channels, N samples.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

_MAX_FRAMES = 64
_MAX_SIDE = 320
_MAX_SECONDS = 30
_SHORTEST_FRAME_SECONDS = 0.02  # browsers show a GIF's shorter ones at 0.1 s


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A picture, or a film as an animated GIF."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSound:
    """A WAV file."""

    data: bytes
    sample_rate_hz: int
    channels: int
    samples: int


def read_picture(path: Path) -> EncodedImage:
    """Returns a PNG as it is."""
    with Image.open(path) as picture:
        return EncodedImage(data=path.read_bytes(), width=picture.width, height=picture.height)


def read_film(path: Path) -> EncodedImage:
    """Returns a film as an endless GIF of its own speed.

    Its size is bounded: sides of at most 320 pixels, at most 64 frames, evenly spaced over the whole film.

    Raises:
        ValueError: If there is no frame in it.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate_hz = float(stream.average_rate or 12)
        every = max(1, -(-stream.frames // _MAX_FRAMES), round(rate_hz * _SHORTEST_FRAME_SECONDS))
        shown = islice(container.decode(stream), 0, _MAX_FRAMES * every, every)
        frames = [_fitted(frame.to_image()) for frame in shown]
    if not frames:
        raise ValueError(f"{path}: must be a film with a frame, got none.")
    file = io.BytesIO()
    milliseconds = round(1000 * every / rate_hz)
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return EncodedImage(data=file.getvalue(), width=frames[0].width, height=frames[0].height)


def read_sound(path: Path) -> EncodedSound | None:
    """Returns the first 30 s of a sound or of a film's sound as 16-bit PCM; None if there is none."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        rate_hz, channels = stream.rate, min(2, stream.channels)
        resampler = av.AudioResampler(
            format="s16", layout="stereo" if channels == 2 else "mono", rate=rate_hz
        )
        parts: list[npt.NDArray[np.int16]] = []
        total = 0
        for frame in container.decode(stream):
            for part in resampler.resample(frame):
                parts.append(part.to_ndarray().reshape(-1).astype(np.int16))
                total += part.samples
            if total >= rate_hz * _MAX_SECONDS:
                break
    samples = np.concatenate([np.empty(0, np.int16), *parts])[: rate_hz * _MAX_SECONDS * channels]
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate_hz)
        sound.writeframes(samples.astype("<i2").tobytes())
    return EncodedSound(
        data=file.getvalue(), sample_rate_hz=rate_hz, channels=channels, samples=len(samples) // channels
    )


def _fitted(frame: Image.Image) -> Image.Image:
    scale = min(1.0, _MAX_SIDE / max(frame.size))
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    return frame if size == frame.size else frame.resize(size, Image.Resampling.LANCZOS)
