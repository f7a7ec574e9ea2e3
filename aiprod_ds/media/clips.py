"""Clips that a model has made, to look at and to listen to: each as an MP4, and some frames of all on one
contact sheet.

Takes what was sampled and decoded. Shapes: N stills, T frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from aiprod_ds.media.mp4 import Pixels, Sound, encode_mp4
from aiprod_ds.media.pictures import enlargement, to_pixels

_NUM_STILLS = 5
_MAX_STILL_WIDTH = 384
_MIN_SHEET_WIDTH = 560
_GAP, _MARGIN, _TITLE_HEIGHT, _CAPTION_HEIGHT = 6, 18, 40, 24
_INK, _GREY, _PAPER = (24, 28, 36), (110, 116, 128), (255, 255, 255)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A clip in the form in which it is written, small enough to travel between processes.

    Attributes:
        mp4: Bytes of the file: all frames, and the sound.
        stills: [N, H, W, 3], at most five frames, evenly spaced from the first to the last.
    """

    mp4: bytes
    stills: Pixels


def make_clip(video_CTHW: Tensor, *, frame_rate_hz: float, sound: Sound | None = None) -> Clip:
    """Returns a clip to write.

    Frames smaller than 160 pixels are enlarged with nearest-neighbour. Pixels that are not finite are
    magenta.

    Args:
        video_CTHW: [3, T, H, W] in [-1, 1]; values outside are clipped.
        frame_rate_hz: Frames per second.
        sound: Begins with the first frame; need not end with the last.
    """
    frames_THWC = to_pixels(video_CTHW)
    scale = enlargement(*frames_THWC.shape[1:3])
    enlarged_THWC = frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)
    shown = np.unique(np.linspace(0, len(frames_THWC) - 1, _NUM_STILLS).round().astype(int))
    return Clip(
        mp4=encode_mp4(enlarged_THWC, frame_rate_hz=frame_rate_hz, sound=sound), stills=enlarged_THWC[shown]
    )


def save_contact_sheet(clips: Sequence[Clip], captions: Sequence[str], path: Path, *, title: str) -> None:
    """Writes a PNG with one row for each clip: its caption, and its stills under it.

    Args:
        clips: At least one.
        captions: One for each clip; what does not fit on one line is cut.
        path: The PNG; its folder must exist.
        title: Printed on top.
    """
    rows = [[_still(pixels_HWC) for pixels_HWC in clip.stills] for clip in clips]
    widest = max(sum(still.width + _GAP for still in row) - _GAP for row in rows)
    width = max(widest + 2 * _MARGIN, _MIN_SHEET_WIDTH)
    height = _TITLE_HEIGHT + sum(_CAPTION_HEIGHT + row[0].height + _MARGIN for row in rows)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _TITLE_HEIGHT // 2), title, fill=_INK, font=ImageFont.load_default(19), anchor="lm")
    font = ImageFont.load_default(14)
    top = _TITLE_HEIGHT
    for row, caption in zip(rows, captions, strict=True):
        line = _cut(caption, draw, font, width - 2 * _MARGIN)
        draw.text((_MARGIN, top + _CAPTION_HEIGHT // 2), line, fill=_GREY, font=font, anchor="lm")
        top += _CAPTION_HEIGHT
        left = _MARGIN
        for still in row:
            canvas.paste(still, (left, top))
            left += still.width + _GAP
        top += row[0].height + _MARGIN
    canvas.save(path, format="PNG")


def _still(pixels_HWC: Pixels) -> Image.Image:
    still = Image.fromarray(pixels_HWC)
    if still.width <= _MAX_STILL_WIDTH:
        return still
    size = (_MAX_STILL_WIDTH, max(1, round(still.height * _MAX_STILL_WIDTH / still.width)))
    return still.resize(size, Image.Resampling.LANCZOS)


def _cut(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, max_width: int
) -> str:
    line = " ".join(text.split())
    if draw.textlength(line, font=font) <= max_width:
        return line
    while line and draw.textlength(f"{line}...", font=font) > max_width:
        line = line[:-1]
    return f"{line}..."
