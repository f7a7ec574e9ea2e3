"""From a file to a training clip: decodes exact frames, then resizes, crops and flips them.

Owns pixels and time; what exists is `manifest.py`'s, what is asked is `dataset.py`'s. PyAV's errors end here.
Shapes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from aiprod_ds.data.manifest import MediaRecord
from aiprod_ds.errors import DataError

_DEFAULT_RATE_HZ = 25.0
_EPSILON = 1e-6
# Demuxers that seek by an index or exact timestamps. After a seek in MPEG program or transport streams the timestamps are
# FFmpeg's guesses, one frame off in `test_every_container_gives_the_same_frames`, so those are decoded from the beginning.
_EXACT_SEEK = frozenset({"mov", "mp4", "matroska", "webm", "avi"})


def decode_clip(path: Path, *, start_seconds: float, num_frames: int, frame_rate_hz: float | None) -> NDArray[np.uint8]:
    """Decodes `num_frames` frames from `start_seconds` on, counted from the stream's first timestamp.

    Args:
        path: The file.
        start_seconds: Where to start; the first frame is the one nearest to it.
        num_frames: How many frames, at least 1.
        frame_rate_hz: Frame i is the one nearest to `start_seconds + i / frame_rate_hz`; None takes consecutive frames.

    Returns:
        [T,H,W,3] uint8 RGB, as displayed (rotation metadata applied).

    Raises:
        DataError: If the file cannot be decoded or ends too early.
    """
    try:
        frames = _decode(path, start_seconds, num_frames, frame_rate_hz)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: must be a decodable video, got: {error}. Repair or remove the file.") from error
    if len(frames) < num_frames:
        rate = "" if frame_rate_hz is None else f" at {frame_rate_hz:g} Hz"
        raise DataError(
            f"{path}: must have {num_frames} frames{rate} from {start_seconds:.3f} s on, got {len(frames)}. "
            "Ask for fewer frames, start earlier or remove the file."
        )
    return np.stack(frames)


def max_start_seconds(record: MediaRecord, num_frames: int, frame_rate_hz: float | None) -> float:
    """Returns the latest start that leaves `num_frames` frames.

    `seconds - num_frames / rate`, with the clip's own rate for None. Worked number: 2 s at 24 Hz and 24 frames leave 1.0 s.

    Raises:
        DataError: If the clip is too short.
    """
    rate_hz = record.fps if frame_rate_hz is None else frame_rate_hz
    latest = record.seconds - num_frames / rate_hz
    if latest < -_EPSILON:
        raise DataError(
            f"{record.path}: must have {num_frames} frames at {rate_hz:g} Hz, got {int(record.seconds * rate_hz + _EPSILON)}. "
            "Ask for fewer frames or remove the clip."
        )
    return max(0.0, latest)


def fit_clip(frames: NDArray[np.uint8] | torch.Tensor, *, height: int, width: int, seed: int | None, flip: bool) -> torch.Tensor:
    """Scales a clip with antialiasing until it just covers `height` x `width`, then crops it.

    Args:
        frames: [T,H,W,3] uint8, or [3,T,H,W] floating in [-1,1].
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        seed: Decides the crop and the flip; None takes the centre and never flips.
        flip: Whether half of the seeds mirror the clip from left to right.

    Returns:
        [3,T,H,W] float32 in [-1,1], contiguous.

    Raises:
        DataError: If `frames` has another shape or dtype.
    """
    video_TCHW = _covering(_as_TCHW(frames), height, width)
    spare_height, spare_width = video_TCHW.shape[2] - height, video_TCHW.shape[3] - width
    top, left, is_flipped = spare_height // 2, spare_width // 2, False
    if seed is not None:
        draws = np.random.default_rng(seed)
        top, left = int(draws.integers(spare_height + 1)), int(draws.integers(spare_width + 1))
        is_flipped = flip and bool(draws.integers(2))
    video_TCHW = video_TCHW[:, :, top : top + height, left : left + width]
    if is_flipped:
        video_TCHW = video_TCHW.flip(-1)
    return video_TCHW.transpose(0, 1).clamp(-1.0, 1.0).contiguous()


def _as_TCHW(frames: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:  # noqa: N802  # the suffix is the result's shape
    clip = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
    if clip.dtype == torch.uint8 and clip.ndim == 4 and clip.shape[3] == 3:
        return clip.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    if clip.is_floating_point() and clip.ndim == 4 and clip.shape[0] == 3:
        return clip.transpose(0, 1).float()
    raise DataError(
        "fit_clip: frames must be [T,H,W,3] uint8 or [3,T,H,W] floating in [-1,1], "
        f"got {list(clip.shape)} {clip.dtype}. Convert the clip first."
    )


def _covering(video_TCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    old_height, old_width = video_TCHW.shape[2:]
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    if size == (old_height, old_width):
        return video_TCHW
    return F.interpolate(video_TCHW, size=size, mode="bilinear", antialias=True, align_corners=False)


def _decode(path: Path, start_seconds: float, num_frames: int, frame_rate_hz: float | None) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: must hold a video stream, got none. Remove the file.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        period = 1.0 / float(stream.average_rate or _DEFAULT_RATE_HZ)
        timed = _from_keyframe(container, stream, start_seconds, period)
        if frame_rate_hz is None:
            return _consecutive(timed, start_seconds, num_frames)
        targets = [start_seconds + index / frame_rate_hz for index in range(num_frames)]
        return _nearest(timed, targets, period)


def _from_keyframe(
    container: av.container.InputContainer, stream: av.VideoStream, start_seconds: float, period: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields (seconds, frame) from a keyframe at or before `start_seconds`."""
    is_exact = not _EXACT_SEEK.isdisjoint(container.format.name.split(","))
    if is_exact and stream.time_base is not None and start_seconds > 0:
        container.seek((stream.start_time or 0) + int(start_seconds / stream.time_base), stream=stream)
        timed = _timed(container, stream, period)
        first = next(timed, None)
        # A broken index may land too late; then decoding starts at the beginning.
        if first is not None and first[1].pts is not None and first[0] <= start_seconds + _EPSILON:
            yield first
            yield from timed
            return
        container.seek(stream.start_time or 0, stream=stream)
    yield from _timed(container, stream, period)


def _timed(
    container: av.container.InputContainer, stream: av.VideoStream, period: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    seconds = -period
    for frame in container.decode(stream):
        if frame.pts is None or stream.time_base is None:
            seconds += period
        else:
            seconds = float((frame.pts - (stream.start_time or 0)) * stream.time_base)
        yield seconds, frame


def _consecutive(timed: Iterable[tuple[float, av.VideoFrame]], start_seconds: float, num_frames: int) -> list[NDArray[np.uint8]]:
    """Returns up to `num_frames` frames, the first of which is the nearest to `start_seconds`."""
    chosen: list[NDArray[np.uint8]] = []
    before: tuple[float, av.VideoFrame] | None = None
    for seconds, frame in timed:
        if not chosen and seconds < start_seconds:
            before = (seconds, frame)
            continue
        if not chosen and before is not None and start_seconds - before[0] <= seconds - start_seconds:
            chosen.append(_pixels(before[1]))
        if len(chosen) < num_frames:
            chosen.append(_pixels(frame))
        if len(chosen) == num_frames:
            return chosen
    return chosen


def _nearest(timed: Iterable[tuple[float, av.VideoFrame]], targets: list[float], period: float) -> list[NDArray[np.uint8]]:
    """Returns the frame nearest to each of the rising `targets`, up to one frame's period after the last frame."""
    chosen: list[NDArray[np.uint8]] = []
    before: tuple[float, av.VideoFrame] | None = None
    for seconds, frame in timed:
        if before is not None:
            _repeat(chosen, before[1], targets, until=(before[0] + seconds) / 2)
        if len(chosen) == len(targets):
            return chosen
        before = (seconds, frame)
    if before is not None:
        _repeat(chosen, before[1], targets, until=before[0] + period - _EPSILON)
    return chosen


def _repeat(chosen: list[NDArray[np.uint8]], frame: av.VideoFrame, targets: list[float], *, until: float) -> None:
    last = len(chosen)
    while last < len(targets) and targets[last] <= until:
        last += 1
    if last > len(chosen):
        chosen.extend([_pixels(frame)] * (last - len(chosen)))


def _pixels(frame: av.VideoFrame) -> NDArray[np.uint8]:
    # The angle says how far to turn the frame counterclockwise, as np.rot90 counts.
    pixels: NDArray[np.uint8] = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
    return pixels
