"""Where the scenes of a film begin: hard cuts, found by how much a frame differs from the one before it.

Owns the measure and the rule, which are those of PySceneDetect's two detectors, so that its thresholds hold;
what becomes of the scenes is `data/scenes.py`'s. PyAV's errors end here. Shapes: H height, W width.

A scene begins with a frame whose `change` is

    at least the threshold                                                     (ContentDetector), or
    at least 5/9 of it, and 3 times the mean of the two before and two after   (AdaptiveDetector):

cuts between shots of one place change little, but at once. Source: PySceneDetect 0.7.2,
`scenedetect.detectors.content_detector` and `adaptive_detector` (27, 15 and 3 by default). Deviations: either
rule is enough; hues are compared around their circle, and that of almost grey pixels does not count (both are
noise of the codec); there is no shortest scene; frames are scaled to 128 pixels at most by FFmpeg. The
package itself needs OpenCV, 60 MB, for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from aiprod_ds.decode.frames import TimedFrame, animation_frames, is_animated_webp, timed_frames
from aiprod_ds.errors import DataError

_LONGER_SIDE = 128
_LEAST_CHROMA = 12  # of 255; below it a hue is chance
_LEAST_PART, _TIMES, _AROUND = 15 / 27, 3.0, 2
_HUES = 180.0  # half degrees, as OpenCV counts them


def find_cuts(path: Path, *, threshold: float) -> tuple[float, ...]:
    """Returns when scenes begin, but for the first: seconds of their first frames, counted from the file's
    first.

    Args:
        path: Any container and codec that FFmpeg decodes; its first video stream is taken, to the end.
        threshold: Of `change`.

    Raises:
        DataError: If the file cannot be decoded; the message leaves out its name.
    """
    times: list[float] = []
    changes: list[float] = []
    try:
        before: NDArray[np.float32] | None = None
        for item in _frames(path):
            hsv = _hsv(item.frame)
            if before is not None:
                times.append(item.seconds)
                # A film that changes its size begins anew in any case.
                changes.append(change(before, hsv) if hsv.shape == before.shape else np.inf)
            before = hsv
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"cannot be decoded to its end: {error}") from error
    return tuple(
        seconds for index, seconds in enumerate(times) if begins_scene(changes, index, threshold=threshold)
    )


def begins_scene(changes: Sequence[float], index: int, *, threshold: float) -> bool:
    """Returns whether the frame after change `index` begins a scene, by the rule at the top of this file."""
    own = changes[index]
    if own >= threshold:
        return True
    around = [*changes[max(0, index - _AROUND) : index], *changes[index + 1 : index + 1 + _AROUND]]
    is_sudden = bool(around) and own >= _TIMES * sum(around) / len(around)
    return is_sudden and own >= threshold * _LEAST_PART


def change(one_3HW: NDArray[np.float32], other_3HW: NDArray[np.float32]) -> float:
    """Returns how much two frames differ: the mean over hue, saturation and value of their mean absolute
    differences, hue in half degrees and the others in 0 to 255.

    Worked number: from black to white only the value changes, by 255: 85. Red to green of full saturation is
    60 half degrees of hue: 20.
    """
    differences = np.abs(one_3HW - other_3HW)
    hue = np.minimum(differences[0], _HUES - differences[0])
    is_grey = np.isnan(hue)
    means = (np.where(is_grey, 0, hue).mean(), differences[1].mean(), differences[2].mean())
    return float(sum(means) / len(means))


def _frames(path: Path) -> Iterator[TimedFrame]:
    if is_animated_webp(path):
        yield from animation_frames(path)
        return
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError("holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from timed_frames(container, stream, is_beginning=True)


def _hsv(frame: av.VideoFrame) -> NDArray[np.float32]:
    """Returns [3,H,W] of a small copy; the hue of grey pixels is NaN."""
    scale = min(1.0, _LONGER_SIDE / max(frame.width, frame.height))
    small = frame.reformat(
        width=max(2, round(frame.width * scale)),
        height=max(2, round(frame.height * scale)),
        format="rgb24",
        interpolation="AREA",
    )
    rgb = np.moveaxis(small.to_ndarray(), 2, 0).astype(np.float32)
    red, green, blue = rgb
    value, chroma = rgb.max(axis=0), np.ptp(rgb, axis=0)
    divisor = np.maximum(chroma, 1)
    sixth = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = np.where(chroma < _LEAST_CHROMA, np.nan, sixth % 6 * (_HUES / 6))
    saturation = 255 * chroma / np.maximum(value, 1)
    return np.stack([hue, saturation, value]).astype(np.float32)
