"""Middle frames of some clips, small, as the contact sheet shows them; what cannot be decoded there is named.

Owns the pictures; which clips they are of is `run.py`'s choice, how they stand on the page the page's.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from aiprod_ds import progress
from aiprod_ds.decode.container_crop import container_crop
from aiprod_ds.decode.video import decode_clip
from aiprod_ds.errors import DataError
from aiprod_ds.survey.demands import Demands
from aiprod_ds.survey.rows import Row

_LONG_SIDE, _QUALITY = 240, 78
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One clip on the contact sheet.

    Attributes:
        row: Its facts.
        jpeg: Its middle frame as displayed; empty if it cannot be decoded.
        width: Of the picture.
        height: Of the picture.
        problem: Why it cannot be decoded.
    """

    row: Row
    jpeg: bytes = b""
    width: int = 0
    height: int = 0
    problem: str = ""

    @property
    def path(self) -> str:
        """Of the clip."""
        return self.row.path


def tiles_of(rows: Iterable[Row], root: Path, demands: Demands) -> list[Tile]:
    """Returns the middle frames of pictures and films, decoded several at a time."""
    known = list(rows)
    tile = partial(_tile, root=root, demands=demands)
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        return list(progress.steps(threads.map(tile, known), "drawing the contact sheet:", len(known)))


def _tile(row: Row, *, root: Path, demands: Demands) -> Tile:
    file = root / row.path
    try:
        pixels_THWC = decode_clip(
            file,
            start_seconds=row.seconds / 2 if row.frames > 1 else 0.0,
            num_frames=1,
            frame_rate_hz=None,
            background=demands.pictures.alpha_background,
            crop=container_crop(file) if row.cropped else (0, 0, 0, 0),
        )
    except (DataError, OSError, ValueError) as error:
        return Tile(row=row, problem=str(error).removeprefix(f"{file}: "))
    scale = min(1.0, _LONG_SIDE / max(row.width, row.height))
    size = (max(1, round(row.width * scale)), max(1, round(row.height * scale)))
    picture = Image.fromarray(pixels_THWC[0]).resize(size, Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=_QUALITY, optimize=True)
    return Tile(row=row, jpeg=written.getvalue(), width=size[0], height=size[1])
