"""From a decoded frame to RGB pixels as displayed: deinterlaced, in SDR, on a background, turned upright.

Owns the order of these steps; each is a file of its own. Called by `video.py` and `probe.py`. Shapes: H
height, W width, three channels last.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from aiprod_ds.decode.deinterlace import Deinterlacer
from aiprod_ds.decode.frames import MissingNeighbourError, TimedFrame, UndecodableError
from aiprod_ds.decode.orientation import Orientation, orientation_of
from aiprod_ds.decode.tone_map import is_wide, to_sdr

Color = tuple[int, int, int]
"""RGB of 8 bits."""
BLACK: Color = (0, 0, 0)
NO_CROP = (0, 0, 0, 0)


class Painter:
    """Makes pixels of the frames of one file.

    Args:
        path: The file.
        background: What lies behind transparent pixels.
        crop: What the container does not show: top, bottom, left, right.
    """

    def __init__(
        self, path: Path, background: Color = BLACK, crop: tuple[int, int, int, int] = NO_CROP
    ) -> None:
        self._path = path
        self._background = background
        self._crop = crop
        self._deinterlacer = Deinterlacer()
        self._to_rgb = VideoReformatter()
        self._known_orientation: tuple[int, Orientation] | None = None

    def pixels(self, item: TimedFrame) -> NDArray[np.uint8]:
        """Returns a frame's pixels, [H,W,3] uint8 RGB, upright; not yet stretched where they are not square.

        Raises:
            UndecodableError: If the frame is damaged, a neighbour that it needs was not decoded, or it is
                turned by something else than quarter turns.
        """
        frame = item.frame
        if frame.is_corrupt:
            raise UndecodableError(f"damaged data in the frame of timestamp {frame.pts}")
        orientation = self._orientation(frame)
        if frame.interlaced_frame:
            if item.lacks_before:
                raise MissingNeighbourError(f"no frame before the interlaced one of timestamp {frame.pts}")
            if any(other is not None and other.is_corrupt for other in (item.before, item.after)):
                raise UndecodableError(f"damaged data beside the frame of timestamp {frame.pts}")
            frame = self._deinterlacer.whole(frame, before=item.before, after=item.after)
        pixels_HWC = to_sdr(frame) if is_wide(frame) else self._rgb(frame)
        alpha_HW = alpha_of(frame)
        if alpha_HW is not None:
            pixels_HWC = _on_background(pixels_HWC, alpha_HW, self._background)
        return orientation.upright(self._shown(pixels_HWC))

    def _rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        # `frame.to_ndarray(format=...)` would make a converter for each frame, with a thread for each core.
        rgb = self._to_rgb.reformat(frame, format="rgb24", threads=1)
        return cast("NDArray[np.uint8]", rgb.to_ndarray())

    def _orientation(self, frame: av.VideoFrame) -> Orientation:
        # PyAV 18: asking a frame for its side data ties it into a circle (frame.py, `side_data`), which keeps
        # its memory until the garbage collector comes, and the decoder from using that memory again.
        rotation = frame.rotation
        if self._known_orientation is None or self._known_orientation[0] != rotation:
            self._known_orientation = (rotation, orientation_of(frame, self._path))
        return self._known_orientation[1]

    def _shown(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        top, bottom, left, right = self._crop
        height, width = pixels_HWC.shape[:2]
        return pixels_HWC[top : height - bottom, left : width - right]


def alpha_of(frame: av.VideoFrame) -> NDArray[np.uint8] | None:
    """Returns how opaque each pixel is, [H,W] uint8; None if all are, fully."""
    if not _carries_alpha(frame.format.name):
        return None
    alpha_HW = _converted(frame, "rgba")[..., 3]
    return None if alpha_HW.min() == 255 else alpha_HW


@functools.cache
def _carries_alpha(pixel_format: str) -> bool:
    known = av.VideoFormat(pixel_format)
    return known.has_palette or any(part.is_alpha for part in known.components)


def _converted(frame: av.VideoFrame, pixel_format: str) -> NDArray[np.uint8]:
    return cast("NDArray[np.uint8]", frame.to_ndarray(format=pixel_format))


def _on_background(
    pixels_HWC: NDArray[np.uint8], alpha_HW: NDArray[np.uint8], background: Color
) -> NDArray[np.uint8]:
    """Returns a c + (1 - a) b of codes, not of light, as browsers and players do; rounded."""
    alpha_HW1 = alpha_HW[..., None].astype(np.uint32)
    mixed = pixels_HWC * alpha_HW1 + np.array(background, dtype=np.uint32) * (255 - alpha_HW1)
    return ((mixed + 127) // 255).astype(np.uint8)
