"""From a file to the frames of a clip: exactly those that a clip's times ask for, wherever decoding starts.

Owns seeking and the choice of frames; what is in a file is `frames.py`'s, colours are `pixels.py`'s, sizes
`fit.py`'s, what is asked is `data/dataset.py`'s. PyAV's errors end here. Shapes: T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from aiprod_ds.decode.frames import (
    EXACT_SEEK,
    MissingNeighbourError,
    TimedFrame,
    UndecodableError,
    animation_frames,
    is_among,
    is_animated_webp,
    timed_frames,
)
from aiprod_ds.decode.pixels import BLACK, NO_CROP, Color, Painter
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError

_EPSILON = 1e-6
# Without it FFmpeg repairs damaged H.264 and drops damaged HEVC frames, and neither shows.
STRICT_DECODING = {"err_detect": "explode"}
# An interlaced frame needs the one before it. Three periods are at least one frame where fields are counted.
_LEAD_PERIODS = 3


def decode_clip(
    path: Path,
    *,
    start_seconds: float,
    num_frames: int,
    frame_rate_hz: float | None,
    background: Color = BLACK,
    crop: tuple[int, int, int, int] = NO_CROP,
    end_seconds: float | None = None,
) -> NDArray[np.uint8]:
    """Decodes `num_frames` frames from `start_seconds` on, counted from the stream's first timestamp.

    Args:
        path: Any container and codec that FFmpeg decodes; its first video stream is taken.
        start_seconds: Where to start; the first frame is the one nearest to it.
        num_frames: How many frames, at least 1.
        frame_rate_hz: Frame i is the one nearest to `start_seconds + i / frame_rate_hz`; None takes
            consecutive frames.
        background: RGB behind transparent pixels.
        crop: Of `MediaRecord`: what the container does not show.
        end_seconds: Frames from there on are of another scene, as if the file had ended; None: there are
            none.

    Returns:
        [T,H,W,3] uint8 RGB, as displayed: deinterlaced, in SDR, opaque and upright. Where pixels are not
        square, `fit_clip` stretches them to the size that `MediaRecord` states.

    Raises:
        DataError: If the file ends too early, or a frame that the clip needs is damaged. A codec that carries
            no redundancy (VP8, VP9) decodes some damage to wrong pixels, which nobody can see.
    """
    painter = Painter(path, background, crop)
    asked = _Asked(start_seconds, end_seconds, num_frames, frame_rate_hz)
    try:
        if is_animated_webp(path):
            clip = _chosen(animation_frames(path), painter, asked)
        else:
            clip = _decode(path, painter, asked)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be a decodable video, got: {error}. Repair or remove the file."
        ) from error
    if len(clip) < num_frames:
        rate = "" if frame_rate_hz is None else f" at {frame_rate_hz:g} Hz"
        raise DataError(
            f"{path}: must have {num_frames} frames{rate} from {start_seconds:.3f} s on, got {len(clip)}. "
            "Ask for fewer frames, start earlier or remove the file."
        )
    if len(clip.sizes) > 1:
        raise DataError(
            f"{path}: must have one size, got frames of {' and '.join(sorted(clip.sizes))}. "
            "Convert or remove the file."
        )
    return clip.frames()


def max_start_seconds(record: MediaRecord, num_frames: int, frame_rate_hz: float | None) -> float:
    """Returns the latest start that leaves `num_frames` frames.

    `seconds - num_frames / rate`, with the clip's own rate for None and for a single frame, which has no
    rate. Worked number: 2 s at 24 Hz and 24 frames leave 1.0 s.

    Raises:
        DataError: If the clip is too short.
    """
    rate_hz = record.fps if frame_rate_hz is None or num_frames == 1 else frame_rate_hz
    latest = record.seconds - num_frames / rate_hz
    if latest < -_EPSILON:
        raise DataError(
            f"{record.path}: must have {num_frames} frames at {rate_hz:g} Hz, got "
            f"{int(record.seconds * rate_hz + _EPSILON)}. "
            "Ask for fewer frames or remove the clip."
        )
    return max(0.0, latest)


class _Asked(NamedTuple):
    """Which frames a clip takes; see `decode_clip`."""

    start_seconds: float
    end_seconds: float | None
    num_frames: int
    frame_rate_hz: float | None


class _Clip:
    """The chosen frames, written one after the other into one array.

    A list of frames to be stacked at the end takes twice the memory, and all of it new to the process, which
    costs more than converting the colors does.
    """

    def __init__(self, painter: Painter, num_frames: int) -> None:
        self._painter = painter
        self._num_frames = num_frames
        self._length = 0
        self._frames: NDArray[np.uint8] | None = None
        self.sizes: set[str] = set()

    def __len__(self) -> int:
        return self._length

    def add(self, item: TimedFrame, *, times: int = 1) -> None:
        """Appends a frame as displayed, `times` times."""
        pixels_HWC = self._painter.pixels(item)
        self.sizes.add(f"{pixels_HWC.shape[1]}x{pixels_HWC.shape[0]}")
        if self._frames is None:
            self._frames = np.empty((self._num_frames, *pixels_HWC.shape), dtype=np.uint8)
        if len(self.sizes) == 1:
            self._frames[self._length : self._length + times] = pixels_HWC
        self._length += times

    def frames(self) -> NDArray[np.uint8]:
        """Returns [T,H,W,3]; all frames must be there, of one size."""
        assert self._frames is not None, "there is at least one frame"
        return self._frames


def _decode(path: Path, painter: Painter, asked: _Asked) -> _Clip:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: must hold a video stream, got none. Remove the file.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"  # PyAV's default, threads within a frame, leaves most codecs on one core
        stream.codec_context.options = STRICT_DECODING
        lead_seconds = _LEAD_PERIODS / float(stream.average_rate) if stream.average_rate else 0.0
        has_moved = False
        for sought_seconds in (asked.start_seconds, asked.start_seconds - lead_seconds):
            if not _seek(container, stream, sought_seconds):
                break
            has_moved = True
            timed = _reaching(timed_frames(container, stream, is_beginning=False), sought_seconds)
            try:
                return _chosen(timed, painter, asked)
            except MissingNeighbourError:
                continue
            except UndecodableError:
                # Not always damage: after a seek, H.264 with intra refresh is incomplete for some frames, and
                # an index may be wrong. From the beginning, what fails is damaged and the frames are counted
                # truly.
                break
        if has_moved:
            container.seek(stream.start_time or 0, stream=stream)
        timed = timed_frames(container, stream, is_beginning=True)
        return _chosen(timed, painter, asked)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, start_seconds: float) -> bool:
    """Moves to a keyframe near `start_seconds` if the container can; returns whether it did."""
    if start_seconds <= 0 or stream.time_base is None or not is_among(container, EXACT_SEEK):
        return False
    container.seek((stream.start_time or 0) + int(start_seconds / stream.time_base), stream=stream)
    return True


def _chosen(timed: Iterable[TimedFrame], painter: Painter, asked: _Asked) -> _Clip:
    start_seconds, end_seconds, num_frames, frame_rate_hz = asked
    if end_seconds is not None:
        last = end_seconds - _EPSILON
        timed = takewhile(lambda item: item.seconds < last, timed)
    clip = _Clip(painter, num_frames)
    if frame_rate_hz is None:
        _consecutive(timed, clip, start_seconds, num_frames)
    else:
        _nearest(timed, clip, [start_seconds + index / frame_rate_hz for index in range(num_frames)])
    return clip


def _reaching(timed: Iterator[TimedFrame], start_seconds: float) -> Iterator[TimedFrame]:
    first = next(timed, None)
    if first is None or first.seconds > start_seconds + _EPSILON:
        raise UndecodableError("the seek went past the first frame")
    yield first
    yield from timed


def _consecutive(timed: Iterable[TimedFrame], clip: _Clip, start_seconds: float, num_frames: int) -> None:
    """Adds up to `num_frames` frames, the first of which is the nearest to `start_seconds`."""
    before: TimedFrame | None = None
    for item in timed:
        if not len(clip) and item.seconds < start_seconds:
            before = item
            continue
        if (
            not len(clip)
            and before is not None
            and start_seconds - before.seconds <= item.seconds - start_seconds
        ):
            # Only now, because most frames that are decoded on the way are not converted to RGB.
            clip.add(before)
        if len(clip) < num_frames:
            clip.add(item)
        if len(clip) == num_frames:
            return


def _nearest(timed: Iterable[TimedFrame], clip: _Clip, targets: list[float]) -> None:
    """Adds the frame nearest to each of the rising `targets`, up to one frame's period after the last
    frame."""
    before: TimedFrame | None = None
    for item in timed:
        if before is not None:
            _repeat(clip, before, targets, until=(before.seconds + item.seconds) / 2)
        if len(clip) == len(targets):
            return
        before = item
    if before is not None:
        _repeat(clip, before, targets, until=before.seconds + before.period - _EPSILON)


def _repeat(clip: _Clip, item: TimedFrame, targets: list[float], *, until: float) -> None:
    last = len(clip)
    while last < len(targets) and targets[last] <= until:
        last += 1
    if last > len(clip):
        clip.add(item, times=last - len(clip))
