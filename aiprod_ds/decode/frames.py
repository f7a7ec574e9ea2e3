"""The frames of a file in the order of display, with their times, from any place on.

Owns demuxing, decoders and their traps: timestamps, open GOPs, alpha that only another decoder sees, animated
WebP. Which frames a clip takes is `video.py`'s, what becomes of their pixels `pixels.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from PIL import Image

_DEFAULT_RATE_HZ = 25.0
# Demuxers that seek by an index or exact timestamps. After a seek in MPEG program or transport streams the
# timestamps are FFmpeg's guesses, one frame off in `test_every_container_gives_the_same_frames`, so those are
# decoded from the beginning.
EXACT_SEEK = frozenset({"mov", "mp4", "matroska", "webm"})
# AVI holds frames at one rate and no display times; FFmpeg's guesses are out of order where there are
# B-frames.
_CONSTANT_RATE = frozenset({"avi"})
# FFmpeg's own decoders leave out the alpha that WebM keeps beside the frames; libvpx sees it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_WEBP_IS_ANIMATED = 0x02
_WEBP_DEFAULT_MS = 100  # what browsers take for frames that last no time


class UndecodableError(ValueError):
    """A frame cannot be had; says which and why, without the file's name."""


class MissingNeighbourError(UndecodableError):
    """An interlaced frame was reached by a seek that left out the one before it."""


class TimedFrame(NamedTuple):
    """A frame, when it is displayed and for how long if it is the last.

    An interlaced frame has its neighbours, None where there are none; `lacks_before` says that there is one
    before it, which was not decoded.
    """

    seconds: float
    period: float
    frame: av.VideoFrame
    before: av.VideoFrame | None = None
    after: av.VideoFrame | None = None
    lacks_before: bool = False


def timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream, *, is_beginning: bool
) -> Iterator[TimedFrame]:
    """Yields frames in the order of display; seconds rise even where timestamps are missing or jump back.

    Args:
        container: At its beginning or at the keyframe that was sought.
        stream: Of the container.
        is_beginning: Whether the container is at its beginning.

    Raises:
        UndecodableError: If a frame cannot be decoded.
    """
    return with_neighbours(_timed(container, stream), is_beginning=is_beginning)


def with_neighbours(timed: Iterator[TimedFrame], *, is_beginning: bool) -> Iterator[TimedFrame]:
    """Yields the frames with the neighbours of the interlaced ones; of others, none is decoded ahead."""
    before: av.VideoFrame | None = None
    held: TimedFrame | None = None
    for item in timed:
        if held is not None:
            yield held._replace(after=item.frame)
            held = None
        if item.frame.interlaced_frame:
            held = item._replace(before=before, lacks_before=before is None and not is_beginning)
        else:
            yield item
        before = item.frame
    if held is not None:
        yield held


def is_among(container: av.container.InputContainer, demuxers: frozenset[str]) -> bool:
    """Returns whether the container is of one of the `demuxers`."""
    return not demuxers.isdisjoint(container.format.name.split(","))


def is_animated_webp(path: Path) -> bool:
    """Returns whether the file is a WebP of several frames, which FFmpeg cannot decode."""
    if path.suffix.lower() != ".webp":
        return False
    with path.open("rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & _WEBP_IS_ANIMATED)


def animation_frames(path: Path) -> Iterator[TimedFrame]:
    """Yields the frames of an animated WebP, which may be transparent.

    Raises:
        OSError: If it cannot be decoded.
    """
    seconds = 0.0
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            pixels = np.asarray(image.convert("RGBA"))
            period = (image.info.get("duration") or _WEBP_DEFAULT_MS) / 1000
            yield TimedFrame(seconds, period, av.VideoFrame.from_ndarray(pixels, format="rgba"))
            seconds += period


def decoded_frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields the frames in the order of display, from where the container is; alpha is seen.

    Raises:
        av.FFmpegError: If a frame cannot be decoded.
    """
    other = _alpha_decoder(stream)
    first_pts: int | None = None
    for packet in container.demux(stream):
        if first_pts is None:
            first_pts = packet.pts
        # What is displayed before the first keyframe (an open GOP) needs pictures that were not read.
        if packet.pts is not None and first_pts is not None and packet.pts < first_pts:
            continue
        if other is None:
            yield from packet.decode()
        else:
            yield from other.decode(packet if packet.size else None)


def _timed(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[TimedFrame]:
    period = 1.0 / float(stream.average_rate or _DEFAULT_RATE_HZ)
    origin = (stream.start_time or 0) if is_among(container, EXACT_SEEK) else None
    has_times = not is_among(container, _CONSTANT_RATE)
    seconds = -period
    try:
        for frame in decoded_frames(container, stream):
            following = seconds + period
            if has_times and frame.pts is not None and stream.time_base is not None:
                origin = frame.pts if origin is None else origin
                stamp = float((frame.pts - origin) * stream.time_base)
                following = stamp if stamp > seconds else following
            seconds = following
            yield TimedFrame(seconds, period, frame)
    except av.FFmpegError as error:
        raise UndecodableError(f"{error} after frame {round(seconds / period)} ({seconds:.3f} s)") from error


def _alpha_decoder(stream: av.VideoStream) -> VideoCodecContext | None:
    """Returns the decoder that a stream needs for its alpha; None if its own decoder is right."""
    if stream.metadata.get("alpha_mode") != "1":
        return None
    name = _ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name)
    decoder = None if name is None else av.CodecContext.create(name, "r")
    assert decoder is None or isinstance(decoder, VideoCodecContext), "of a video codec"
    return decoder
