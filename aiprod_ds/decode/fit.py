"""From decoded pixels to a training clip: stretched to square pixels and scaled in one step, cropped,
mirrored.

Owns geometry; which frames and what colours is `video.py`'s. Called by `data/dataset.py` and
`encode/media.py`. Shapes: C channels, T frames, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from aiprod_ds.errors import DataError


def fit_clip(
    frames: NDArray[np.uint8] | torch.Tensor,
    *,
    height: int,
    width: int,
    seed: int | None,
    flip: bool,
    displayed: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Scales a clip with antialiasing until it just covers `height` x `width`, then crops it.

    Args:
        frames: [T,H,W,3] uint8, or [3,T,H,W] floating in [-1,1].
        height: Height of the result in pixels; a smaller clip is enlarged.
        width: Width of the result in pixels.
        seed: Decides the crop and the flip; None takes the centre and never flips.
        flip: Whether half of the seeds mirror the clip from left to right.
        displayed: Height and width of the clip as displayed, which decide its aspect; None where its pixels
            are square. Worked number: PAL of 720x576 pixels of 64:45 is displayed as 1024x576; for 288x288
            it is scaled to 512x288 in one step, and the sides are cut.

    Returns:
        [3,T,H,W] float32 in [-1,1], contiguous.

    Raises:
        DataError: If `frames` has another shape or dtype.
    """
    frames_TCHW = _as_TCHW(frames)
    own = (frames_TCHW.shape[2], frames_TCHW.shape[3])
    covering = _covering_size(*(displayed or own), height, width)
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
