"""From a file to a training clip: decodes exact frames, then resizes, crops and flips them.

Owns pixels and time; what a file holds is `probe.py`'s, what is asked is `data/dataset.py`'s. PyAV's errors
end here. Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from aiprod_ds.decode.probe import MediaRecord
from aiprod_ds.errors import DataError

_DEFAULT_RATE_HZ = 25.0
_EPSILON = 1e-6
# Demuxers that seek by an index or exact timestamps. After a seek in MPEG program or transport streams the
# timestamps are FFmpeg's guesses, one frame off in `test_every_container_gives_the_same_frames`, so those are
# decoded from the beginning.
_EXACT_SEEK = frozenset({"mov", "mp4", "matroska", "webm"})
# AVI holds frames at one rate and no display times; FFmpeg's guesses are out of order where there are
# B-frames.
_CONSTANT_RATE = frozenset({"avi"})
# Without it FFmpeg repairs damaged H.264 and drops damaged HEVC frames, and neither shows.
_STRICT_DECODING = {"err_detect": "explode"}


class _Timed(NamedTuple):
    """A frame, when it is displayed and for how long if it is the last."""

    seconds: float
    period: float
    frame: av.VideoFrame


class _UndecodableError(ValueError):
    """A frame cannot be had; says which and why, without the file's name."""


def decode_clip(
    path: Path, *, start_seconds: float, num_frames: int, frame_rate_hz: float | None
) -> NDArray[np.uint8]:
    """Decodes `num_frames` frames from `start_seconds` on, counted from the stream's first timestamp.

    Args:
        path: Any container and codec that FFmpeg decodes; its first video stream is taken.
        start_seconds: Where to start; the first frame is the one nearest to it.
        num_frames: How many frames, at least 1.
        frame_rate_hz: Frame i is the one nearest to `start_seconds + i / frame_rate_hz`; None takes
            consecutive frames.

    Returns:
        [T,H,W,3] uint8 RGB, as displayed (rotation metadata applied).

    Raises:
        DataError: If the file ends too early, or a frame that the clip needs is damaged. A codec that carries
            no redundancy (VP8, VP9) decodes some damage to wrong pixels, which nobody can see.
    """
    try:
        frames = _decode(path, start_seconds, num_frames, frame_rate_hz)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: must be a decodable video, got: {error}. Repair or remove the file."
        ) from error
    if len(frames) < num_frames:
        rate = "" if frame_rate_hz is None else f" at {frame_rate_hz:g} Hz"
        raise DataError(
            f"{path}: must have {num_frames} frames{rate} from {start_seconds:.3f} s on, got {len(frames)}. "
            "Ask for fewer frames, start earlier or remove the file."
        )
    return np.stack(frames)


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


def fit_clip(
    frames: NDArray[np.uint8] | torch.Tensor, *, height: int, width: int, seed: int | None, flip: bool
) -> torch.Tensor:
    """Scales a clip with antialiasing until it just covers `height` x `width`, then crops it.

    Args:
        frames: [T,H,W,3] uint8, or [3,T,H,W] floating in [-1,1].
        height: Height of the result in pixels; a smaller clip is enlarged.
        width: Width of the result in pixels.
        seed: Decides the crop and the flip; None takes the centre and never flips.
        flip: Whether half of the seeds mirror the clip from left to right.

    Returns:
        [3,T,H,W] float32 in [-1,1], contiguous.

    Raises:
        DataError: If `frames` has another shape or dtype.
    """
    frames_TCHW = _as_TCHW(frames)
    covering = _covering_size(frames_TCHW.shape[2], frames_TCHW.shape[3], height, width)
    spare_height, spare_width = covering[0] - height, covering[1] - width
    top, left, is_flipped = spare_height // 2, spare_width // 2, False
    if seed is not None:
        draws = np.random.default_rng(seed)
        top, left = int(draws.integers(spare_height + 1)), int(draws.integers(spare_width + 1))
        is_flipped = flip and bool(draws.integers(2))  # drawn last: `flip` changes no crop
    video_CTHW = torch.empty(3, frames_TCHW.shape[0], height, width)
    # One frame at a time: a 1080p clip of 49 frames in float32 at its own size would take 1.2 GB.
    for index, frame_CHW in enumerate(frames_TCHW):
        scaled_CHW = _scaled(_as_float(frame_CHW), covering)[:, top : top + height, left : left + width]
        video_CTHW[:, index] = scaled_CHW.flip(-1) if is_flipped else scaled_CHW
    return video_CTHW.clamp_(-1.0, 1.0)  # antialiasing weights add up to 1 but for rounding


def _as_TCHW(frames: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:  # noqa: N802  # the suffix is the result's shape
    clip = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
    if clip.dtype == torch.uint8 and clip.ndim == 4 and clip.shape[3] == 3:
        return clip.permute(0, 3, 1, 2)
    if clip.is_floating_point() and clip.ndim == 4 and clip.shape[0] == 3:
        return clip.transpose(0, 1)
    raise DataError(
        "fit_clip: frames must be [T,H,W,3] uint8 or [3,T,H,W] floating in [-1,1], "
        f"got {list(clip.shape)} {clip.dtype}. Convert the clip first."
    )


def _covering_size(old_height: int, old_width: int, height: int, width: int) -> tuple[int, int]:
    scale = max(height / old_height, width / old_width)
    return max(height, round(old_height * scale)), max(width, round(old_width * scale))


def _as_float(frame_CHW: torch.Tensor) -> torch.Tensor:
    return frame_CHW.float().div(127.5).sub(1.0) if frame_CHW.dtype == torch.uint8 else frame_CHW.float()


def _scaled(frame_CHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(frame_CHW.shape[1:]) == size:
        return frame_CHW
    return F.interpolate(frame_CHW[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def _decode(
    path: Path, start_seconds: float, num_frames: int, frame_rate_hz: float | None
) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: must hold a video stream, got none. Remove the file.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"  # PyAV's default, threads within a frame, leaves most codecs on one core
        stream.codec_context.options = _STRICT_DECODING
        if _seek(container, stream, start_seconds):
            try:
                return _chosen(
                    _reaching(_timed(container, stream), start_seconds),
                    start_seconds,
                    num_frames,
                    frame_rate_hz,
                )
            except _UndecodableError:
                # Not always damage: after a seek, H.264 with intra refresh is incomplete for some frames, and
                # an index may be wrong. From the beginning, what fails is damaged and the frames are counted
                # truly.
                container.seek(stream.start_time or 0, stream=stream)
        return _chosen(_timed(container, stream), start_seconds, num_frames, frame_rate_hz)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, start_seconds: float) -> bool:
    """Moves to a keyframe near `start_seconds` if the container can; returns whether it did."""
    if start_seconds <= 0 or stream.time_base is None or not _is_among(container, _EXACT_SEEK):
        return False
    container.seek((stream.start_time or 0) + int(start_seconds / stream.time_base), stream=stream)
    return True


def _chosen(
    timed: Iterable[_Timed], start_seconds: float, num_frames: int, frame_rate_hz: float | None
) -> list[NDArray[np.uint8]]:
    if frame_rate_hz is None:
        return _consecutive(timed, start_seconds, num_frames)
    return _nearest(timed, [start_seconds + index / frame_rate_hz for index in range(num_frames)])


def _reaching(timed: Iterator[_Timed], start_seconds: float) -> Iterator[_Timed]:
    first = next(timed, None)
    if first is None or first.seconds > start_seconds + _EPSILON:
        raise _UndecodableError("the seek went past the first frame")
    yield first
    yield from timed


def _timed(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[_Timed]:
    """Yields frames in the order of display; seconds rise even where timestamps are missing or jump back."""
    period = 1.0 / float(stream.average_rate or _DEFAULT_RATE_HZ)
    origin = (stream.start_time or 0) if _is_among(container, _EXACT_SEEK) else None
    has_times = not _is_among(container, _CONSTANT_RATE)
    seconds = -period
    try:
        for frame in _frames(container, stream):
            following = seconds + period
            if has_times and frame.pts is not None and stream.time_base is not None:
                origin = frame.pts if origin is None else origin
                stamp = float((frame.pts - origin) * stream.time_base)
                following = stamp if stamp > seconds else following
            seconds = following
            yield _Timed(seconds, period, frame)
    except av.FFmpegError as error:
        raise _UndecodableError(f"{error} after frame {round(seconds / period)} ({seconds:.3f} s)") from error


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    first_pts: int | None = None
    for packet in container.demux(stream):
        if first_pts is None:
            first_pts = packet.pts
        # What is displayed before the first keyframe (an open GOP) needs pictures that were not read.
        if packet.pts is not None and first_pts is not None and packet.pts < first_pts:
            continue
        yield from packet.decode()


def _is_among(container: av.container.InputContainer, demuxers: frozenset[str]) -> bool:
    return not demuxers.isdisjoint(container.format.name.split(","))


def _consecutive(timed: Iterable[_Timed], start_seconds: float, num_frames: int) -> list[NDArray[np.uint8]]:
    """Returns up to `num_frames` frames, the first of which is the nearest to `start_seconds`."""
    chosen: list[NDArray[np.uint8]] = []
    before: _Timed | None = None
    for item in timed:
        if not chosen and item.seconds < start_seconds:
            before = item
            continue
        if (
            not chosen
            and before is not None
            and start_seconds - before.seconds <= item.seconds - start_seconds
        ):
            # Only now, because most frames that are decoded on the way are not converted to RGB.
            chosen.append(_pixels(before.frame))
        if len(chosen) < num_frames:
            chosen.append(_pixels(item.frame))
        if len(chosen) == num_frames:
            return chosen
    return chosen


def _nearest(timed: Iterable[_Timed], targets: list[float]) -> list[NDArray[np.uint8]]:
    """Returns the frame nearest to each of the rising `targets`, up to one frame's period after the last
    frame."""
    chosen: list[NDArray[np.uint8]] = []
    before: _Timed | None = None
    for item in timed:
        if before is not None:
            _repeat(chosen, before.frame, targets, until=(before.seconds + item.seconds) / 2)
        if len(chosen) == len(targets):
            return chosen
        before = item
    if before is not None:
        _repeat(chosen, before.frame, targets, until=before.seconds + before.period - _EPSILON)
    return chosen


def _repeat(
    chosen: list[NDArray[np.uint8]], frame: av.VideoFrame, targets: list[float], *, until: float
) -> None:
    last = len(chosen)
    while last < len(targets) and targets[last] <= until:
        last += 1
    if last > len(chosen):
        chosen.extend([_pixels(frame)] * (last - len(chosen)))


def _pixels(frame: av.VideoFrame) -> NDArray[np.uint8]:
    if frame.is_corrupt:
        raise _UndecodableError(f"damaged data in the frame of timestamp {frame.pts}")
    # The angle says how far to turn the frame counterclockwise, as np.rot90 counts.
    pixels: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
    return pixels
