"""Pictures of what a video model does: originals over reconstructions, as a PNG and as a film.

Takes what the trainer has decoded and measured; computes no measures of its own. Shapes: N clips, T frames, H
x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from aiprod_ds.media.mp4 import Pixels, encode_mp4

_MIN_SIDE = 160
_MAX_WIDTH, _MIN_SHEET_WIDTH = 1760, 560
_GAP, _MARGIN, _LEFT = 6, 18, 118
_TITLE_HEIGHT, _LABEL_HEIGHT = 40, 24
_INK, _GREY, _PAPER = (24, 28, 36), (110, 116, 128), (255, 255, 255)
_NOT_A_NUMBER = (255, 0, 255)


def save_comparison(
    original_NCTHW: Tensor,
    reconstruction_NCTHW: Tensor,
    path: Path,
    *,
    title: str,
    psnr_db: Sequence[float] | None = None,
) -> None:
    """Writes a PNG with the first, middle and last frame of every clip, originals over reconstructions.

    Small frames are enlarged to at least 160 pixels with nearest-neighbour, so that every pixel shown is a
    pixel of the clip. Pixels that are not finite are magenta.

    Args:
        original_NCTHW: [N, 3, T, H, W] in [-1, 1].
        reconstruction_NCTHW: Same shape; values outside are clipped.
        path: The PNG; its folder must exist.
        title: Printed on top, e.g. the phase and its resolution.
        psnr_db: One value per clip, printed above it.

    Raises:
        ValueError: If the shapes differ or are not [N, 3, T, H, W].
    """
    _check_pair(original_NCTHW, reconstruction_NCTHW)
    num_clips, _, num_frames, height, width = original_NCTHW.shape
    frames = sorted({0, num_frames // 2, num_frames - 1})
    sheet = _Sheet.plan(num_clips, len(frames), height, width)
    canvas = Image.new("RGB", sheet.size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _TITLE_HEIGHT // 2), title, fill=_INK, font=ImageFont.load_default(19), anchor="lm")
    font = ImageFont.load_default(14)
    for clip in range(num_clips):
        left, top = sheet.corner(clip)
        measure = f"  {psnr_db[clip]:.1f} dB" if psnr_db is not None else ""
        draw.text(
            (left, top + _LABEL_HEIGHT // 2), f"clip {clip + 1}{measure}", fill=_INK, font=font, anchor="lm"
        )
        for line, (name, video) in enumerate(
            (("original", original_NCTHW), ("reconstruction", reconstruction_NCTHW))
        ):
            y = top + _LABEL_HEIGHT + line * (sheet.tile_height + _GAP)
            if clip % sheet.columns == 0:
                draw.text((_LEFT - 10, y + sheet.tile_height // 2), name, fill=_GREY, font=font, anchor="rm")
            for column, frame in enumerate(frames):
                tile = Image.fromarray(to_pixels(video[clip, :, frame : frame + 1])[0])
                tile = tile.resize((sheet.tile_width, sheet.tile_height), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + column * (sheet.tile_width + _GAP), y))
    canvas.save(path, format="PNG")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """Where the clips of a comparison stand, in pixels; clips fill rows from left to right."""

    num_clips: int
    columns: int
    tile_width: int
    tile_height: int
    clip_width: int

    @classmethod
    def plan(cls, num_clips: int, num_frames: int, height: int, width: int) -> _Sheet:
        scale = enlargement(height, width)
        clip_width = num_frames * (width * scale + _GAP) - _GAP
        fitting = (_MAX_WIDTH - _LEFT - _MARGIN + 3 * _GAP) // (clip_width + 3 * _GAP)
        columns = max(1, min(num_clips, fitting))
        return cls(
            num_clips=num_clips,
            columns=columns,
            tile_width=width * scale,
            tile_height=height * scale,
            clip_width=clip_width,
        )

    @property
    def size(self) -> tuple[int, int]:
        rows = -(-self.num_clips // self.columns)
        width = _LEFT + self.columns * (self.clip_width + 3 * _GAP) - 3 * _GAP + _MARGIN
        return max(width, _MIN_SHEET_WIDTH), _TITLE_HEIGHT + rows * self._row_height

    def corner(self, clip: int) -> tuple[int, int]:
        """Returns (left, top) of a clip and its label."""
        row, column = divmod(clip, self.columns)
        return _LEFT + column * (self.clip_width + 3 * _GAP), _TITLE_HEIGHT + row * self._row_height

    @property
    def _row_height(self) -> int:
        return _LABEL_HEIGHT + 2 * self.tile_height + _GAP + _MARGIN


def save_comparison_video(
    original_NCTHW: Tensor,
    reconstruction_NCTHW: Tensor,
    path: Path,
    *,
    frame_rate_hz: float = 12.0,
    num_loops: int = 3,
) -> None:
    """Writes an MP4 with originals on the left and reconstructions on the right, one clip below the other.

    Args:
        original_NCTHW: [N, 3, T, H, W] in [-1, 1].
        reconstruction_NCTHW: Same shape; values outside are clipped.
        path: The MP4; its folder must exist.
        frame_rate_hz: Frames per second.
        num_loops: How often the clips are shown, because short clips are over before one has looked.

    Raises:
        ValueError: If the shapes differ or are not [N, 3, T, H, W].
    """
    _check_pair(original_NCTHW, reconstruction_NCTHW)
    sides = [
        np.concatenate([to_pixels(clip) for clip in video], axis=1)
        for video in (original_NCTHW, reconstruction_NCTHW)
    ]
    film_THWC = np.concatenate(sides, axis=2)
    scale = enlargement(*original_NCTHW.shape[-2:])
    film_THWC = film_THWC.repeat(scale, axis=1).repeat(scale, axis=2)
    path.write_bytes(encode_mp4(np.concatenate([film_THWC] * num_loops), frame_rate_hz=frame_rate_hz))


def to_pixels(video_CTHW: Tensor) -> Pixels:
    """Returns [3, T, H, W] in [-1, 1] as [T, H, W, 3] bytes: -1 is 0, 1 is 255, anything not finite is
    magenta."""
    video_THWC = video_CTHW.detach().to("cpu", torch.float32).permute(1, 2, 3, 0)
    pixels: Pixels = ((video_THWC.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    pixels[~video_THWC.isfinite().all(dim=-1).numpy()] = _NOT_A_NUMBER
    return pixels


def enlargement(height: int, width: int) -> int:
    """Returns the whole factor that makes the smaller side of a frame at least 160 pixels."""
    return max(1, -(-_MIN_SIDE // min(height, width)))


def _check_pair(original: Tensor, reconstruction: Tensor) -> None:
    if original.shape != reconstruction.shape or original.ndim != 5 or original.shape[1] != 3:
        raise ValueError(
            f"pictures: both videos must be [N, 3, T, H, W] of one shape, got {tuple(original.shape)} and "
            f"{tuple(reconstruction.shape)}. Crop the reconstruction to the original."
        )
