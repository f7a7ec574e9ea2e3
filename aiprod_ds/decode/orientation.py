"""How a stored picture is turned and mirrored for display: FFmpeg's display matrix, or EXIF in an image.

Owns the eight ways in which a picture may lie. Called by `pixels.py`. Shapes: H height, W width, C channels.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideData
from numpy.typing import NDArray
from PIL import Image

from aiprod_ds.decode.frames import UndecodableError

_EXIF_ORIENTATION = 274
# A matrix in fixed point is a few units off; what is further off is turned by another angle.
_TOLERANCE = 0.01


class Orientation(NamedTuple):
    """What leads from the stored to the displayed picture: first rows and columns change places, then it is
    mirrored."""

    is_transposed: bool = False
    is_mirrored_across: bool = False
    is_mirrored_down: bool = False

    def upright(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns a view of the pixels as displayed."""
        turned_HWC = pixels_HWC.swapaxes(0, 1) if self.is_transposed else pixels_HWC
        if self.is_mirrored_across:
            turned_HWC = turned_HWC[:, ::-1]
        return turned_HWC[::-1] if self.is_mirrored_down else turned_HWC

    def as_turn(self) -> tuple[int, bool]:
        """Returns (degrees counterclockwise, whether it is mirrored from left to right before the turn)."""
        is_mirrored = self.is_transposed ^ self.is_mirrored_across ^ self.is_mirrored_down
        if self.is_transposed:
            return (90 if self.is_mirrored_down != is_mirrored else 270), is_mirrored
        return (180 if self.is_mirrored_down else 0), is_mirrored


# By EXIF's value, from 1 on.
_OF_EXIF = (
    Orientation(False, False, False),
    Orientation(False, True, False),
    Orientation(False, True, True),
    Orientation(False, False, True),
    Orientation(True, False, False),
    Orientation(True, True, False),
    Orientation(True, True, True),
    Orientation(True, False, True),
)


def orientation_of(frame: av.VideoFrame, path: Path) -> Orientation:
    """Returns how `frame`, decoded from the file at `path`, lies.

    Raises:
        UndecodableError: If it is turned by something else than quarter turns.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV 18 (sidedata.py, `Type`) knows no EXIF and none of FFmpeg's newer kinds, and one of them hides
        # all others. Its `rotation` still knows the matrix, but not whether it mirrors.
        exif = _exif_orientation(path)
        return _OF_EXIF[exif - 1] if exif is not None else _turned(frame.rotation)
    if matrix is None:
        return Orientation()
    assert isinstance(matrix, SideData), "PyAV leaves the type of its mapping open"
    return _of_matrix(bytes(matrix))


def _of_matrix(matrix: bytes) -> Orientation:
    # A pixel (x, y) is displayed at (a x + c y, b x + d y); libavutil/display.h.
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > _TOLERANCE * max(straight, crossed):
        raise UndecodableError("it is displayed turned by something else than quarter turns")
    if crossed > straight:
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def _turned(degrees_counterclockwise: int) -> Orientation:
    turns = (_OF_EXIF[0], _OF_EXIF[7], _OF_EXIF[2], _OF_EXIF[5])
    return turns[round(degrees_counterclockwise / 90) % 4]


def _exif_orientation(path: Path) -> int | None:
    """Returns EXIF's orientation; None if Pillow does not know the file."""
    try:
        with Image.open(path) as image:
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except OSError:
        return None
    return value if value in range(1, len(_OF_EXIF) + 1) else 1
