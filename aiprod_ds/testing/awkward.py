"""Awkward media as people have them, drawn by a few lines: squeezed, turned, interlaced, HDR, transparent,
surround.

Owns what is drawn, so that tests know every value; what must become of it is theirs. Shapes: H height, W
width, C channels, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Wave = NDArray[np.float32]

RED, GREEN, BLUE, GREY = (230, 30, 30), (30, 200, 30), (30, 30, 230), (120, 120, 120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """How a film is stored.

    Attributes:
        codec: FFmpeg's name of the encoder.
        pixel_format: FFmpeg's name of the format.
        options: Of the encoder.
        pixel_aspect: Width of a pixel over its height.
        turn: Degrees counterclockwise for display, then whether it is mirrored across, and down.
        tags: `color_range`, `color_trc`, `color_primaries`, `colorspace` as FFmpeg numbers them.
        rate_hz: Frames a second.
        format: The container; None takes the file's suffix.
        container_options: Of the container.
    """

    codec: str = "ffv1"
    pixel_format: str = "bgr0"
    options: Mapping[str, str] = field(default_factory=dict)
    pixel_aspect: Fraction = Fraction(1)
    turn: tuple[int, bool, bool] = (0, False, False)
    tags: Mapping[str, int] = field(default_factory=dict)
    rate_hz: int = 25
    format: str | None = None
    container_options: Mapping[str, str] = field(default_factory=dict)


def corners(height: int, width: int) -> Pixels:
    """Returns red, green, blue and grey quarters from the top left by rows, [H,W,3]: every turn and mirror
    looks different."""
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, GREY
    return picture


def ramp(height: int, width: int) -> Pixels:
    """Returns a grey picture that rises from left to right, column x of W having 40 + 160 (x + 0.5) / W,
    [H,W,3]."""
    row = np.round(40 + 160 * (np.arange(width) + 0.5) / width).astype(np.uint8)
    picture: Pixels = np.tile(row[None, :, None], (height, 1, 3))
    return picture


def fields(index: int, height: int, width: int, *, is_top_first: bool = True) -> Pixels:
    """Returns frame `index` of a bar that moves four columns a field, its fields woven together, [H,W,3]."""
    times = (2 * index, 2 * index + 1) if is_top_first else (2 * index + 1, 2 * index)
    picture = np.full((height, width, 3), 40, dtype=np.uint8)
    for first_row, time in zip((0, 1), times, strict=True):
        left = 8 + 4 * time % (width - 24)
        picture[first_row::2, left : left + 12] = 200
    return picture


def half_transparent(height: int, width: int) -> Pixels:
    """Returns red of which the left half is fully transparent, [H,W,4]."""
    picture = np.zeros((height, width, 4), dtype=np.uint8)
    picture[..., 0], picture[:, width // 2 :, 3] = 255, 255
    return picture


def write_film(path: Path, pictures: Sequence[Pixels], coding: Coding) -> Path:
    """Writes pictures [H,W,3] or [H,W,4], all of one size, and returns `path`, whose suffix chooses the
    container; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixel_format = {3: "rgb24", 4: "rgba"}[pictures[0].shape[2]]
    options = dict(coding.container_options)
    with av.open(str(path), "w", format=coding.format, options=options) as container:
        stream = container.add_stream(coding.codec, rate=coding.rate_hz, options=dict(coding.options))
        assert isinstance(stream, av.VideoStream), "a video codec"
        context = stream.codec_context
        first = av.VideoFrame.from_ndarray(pictures[0], format=pixel_format)
        context.width, context.height, context.pix_fmt = first.width, first.height, coding.pixel_format
        context.sample_aspect_ratio = coding.pixel_aspect
        _tag(context, coding.tags)
        if coding.turn != (0, False, False):
            stream.set_display_rotation(*coding.turn)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=pixel_format)
            frame.pts, frame.time_base = index, Fraction(1, coding.rate_hz)
            for name, value in coding.tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_codes(path: Path, codes: NDArray[np.uint16], coding: Coding, *, frames: int = 3) -> Path:
    """Writes one still picture of Y, U and V codes in three planes of 10 bits, 4:4:4, and returns `path`.

    Args:
        path: Its suffix chooses the container.
        codes: [3,H,W].
        coding: Its pixel format must be `yuv444p10le`.
        frames: How often it is shown.
    """
    frame = av.VideoFrame(codes.shape[2], codes.shape[1], coding.pixel_format)
    for plane, values in zip(frame.planes, codes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), dtype="<u2")
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    with av.open(str(path), "w") as container:
        stream = container.add_stream(coding.codec, rate=coding.rate_hz, options=dict(coding.options))
        assert isinstance(stream, av.VideoStream), "a video codec"
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, coding.pixel_format
        _tag(stream.codec_context, coding.tags)
        for name, value in coding.tags.items():
            setattr(frame, name, value)
        for index in range(frames):
            frame.pts, frame.time_base = index, Fraction(1, coding.rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_animation(path: Path, pictures: Sequence[Pixels], *, milliseconds: int = 40) -> Path:
    """Writes a GIF or an animated WebP of pictures [H,W,3] or [H,W,4], and returns `path`."""
    images = [Image.fromarray(picture) for picture in pictures]
    options = {"lossless": True} if path.suffix == ".webp" else {"disposal": 2}
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, **options)
    return path


def write_sound(path: Path, wave_CN: Wave, *, codec: str, layout: str, rate_hz: int = 48_000) -> Path:
    """Writes a sound of a layout as FFmpeg names it, and returns `path`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        # Packed: PyAV 18 (audio/frame.py, `from_ndarray`) fails at eight planes.
        packed = np.ascontiguousarray(wave_CN.T, dtype=np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        converter = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=rate_hz)
        for piece in [*converter.resample(frame), *converter.resample(None), None]:
            container.mux(stream.encode(piece))
    return path


def _tag(context: VideoCodecContext, tags: Mapping[str, int]) -> None:
    for name, value in tags.items():
        setattr(context, name, value)
