"""Video made from formulas: data for tests, benchmarks and first steps, with nothing to download.

A clip is a drifting colour gradient with a disc and a square that move over it. It depends on (seed, index)
only.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

FRAME_RATE_HZ = 24
SAMPLE_RATE_HZ = 48_000
AUDIO_FRAME_SAMPLES = 1024  # what the AAC encoder takes at a time


class SyntheticVideoDataset(Dataset[Tensor]):
    """Clips [3,T,H,W] float32 in [-1,1]; the same (seed, index) gives the same clip on every machine.

    Args:
        frames: T, at 24 Hz.
        height: H in pixels, even or odd.
        width: W in pixels.
        seed: Another seed gives other colours, shapes and motion.
    """

    def __init__(self, num_clips: int, frames: int, height: int, width: int, seed: int = 0) -> None:
        self._num_clips = num_clips
        self._shape = (frames, height, width)
        self._seed = seed

    def __len__(self) -> int:
        return self._num_clips

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._num_clips:
            raise IndexError(f"synthetic clips: index must be in [0, {self._num_clips}), got {index}.")
        frames, height, width = self._shape
        draw = np.random.default_rng(stream_seed(self._seed, "synthetic", index))
        t = torch.arange(frames, dtype=torch.float32).view(frames, 1, 1) / FRAME_RATE_HZ
        y = torch.linspace(0, 1, height).view(1, height, 1)
        x = torch.linspace(0, 1, width).view(1, 1, width)
        video_CTHW = _gradient(draw, t, y, x)
        for is_disc in (True, False):
            colour = torch.from_numpy(draw.uniform(-1, 1, size=3)).float().view(3, 1, 1, 1)
            video_CTHW = torch.where(_shape(draw, t, y, x, is_disc=is_disc), colour, video_CTHW)
        return video_CTHW


def write_synthetic_clips(
    folder: Path,
    *,
    num_clips: int,
    frames: int,
    height: int,
    width: int,
    seed: int = 0,
    with_sound: bool = True,
) -> list[Path]:
    """Writes `clip_00000.mp4` and so on (H.264, AAC) and returns their paths.

    Args:
        folder: Made if missing; files of the same names are replaced.
        num_clips: Number of files.
        frames: Frames per clip at 24 Hz.
        height: In pixels; even, as the 4:2:0 pixel format needs.
        width: In pixels; even.
        seed: That of the `SyntheticVideoDataset` whose clips are written.
        with_sound: Adds a stereo tone at 48 kHz of the clip's length, whose pitch depends on the clip.

    Raises:
        DataError: If height or width is odd.
    """
    if height % 2 or width % 2:
        raise DataError(
            f"{folder}: height and width must be even for H.264 in 4:2:0, got {height}x{width}. Round them "
            "up."
        )
    folder.mkdir(parents=True, exist_ok=True)
    clips = SyntheticVideoDataset(num_clips, frames, height, width, seed)
    paths = [folder / f"clip_{index:05d}.mp4" for index in range(num_clips)]
    for index, path in enumerate(paths):
        pitch_hz = np.random.default_rng(stream_seed(seed, "synthetic sound", index)).uniform(200, 800)
        _write(path, clips[index], pitch_hz=float(pitch_hz) if with_sound else None)
    return paths


def _gradient(draw: np.random.Generator, t: Tensor, y: Tensor, x: Tensor) -> Tensor:
    channels = []
    for _ in range(3):
        across, down, speed, start = draw.uniform((-3, -3, -2, 0), (3, 3, 2, 2 * np.pi)).tolist()
        channels.append(torch.sin(across * x + down * y + speed * t + start))
    return torch.stack(channels)


def _shape(draw: np.random.Generator, t: Tensor, y: Tensor, x: Tensor, *, is_disc: bool) -> Tensor:
    """Returns the mask [T,H,W] of one moving shape."""
    radius = float(draw.uniform(0.1, 0.25))
    dy = y - _bounce(float(draw.uniform(0, 2)), float(draw.uniform(-1, 1)), t)
    dx = x - _bounce(float(draw.uniform(0, 2)), float(draw.uniform(-1, 1)), t)
    return dy**2 + dx**2 < radius**2 if is_disc else torch.maximum(dy.abs(), dx.abs()) < radius


def _bounce(start: float, speed: float, t: Tensor) -> Tensor:
    """Returns a position in [0,1] that turns back at both ends."""
    return ((start + speed * t) % 2 - 1).abs()


def _write(path: Path, video_CTHW: Tensor, *, pitch_hz: float | None) -> None:
    frames, height, width = video_CTHW.shape[1:]
    pixels_THWC = ((video_CTHW + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=FRAME_RATE_HZ)
        picture.height, picture.width, picture.pix_fmt = height, width, "yuv420p"
        sound = (
            None if pitch_hz is None else container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="stereo")
        )
        for pixels_HWC in pixels_THWC:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(picture.encode(None))
        if sound is not None and pitch_hz is not None:
            for frame in _tone(pitch_hz, frames * SAMPLE_RATE_HZ // FRAME_RATE_HZ):
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def _tone(pitch_hz: float, num_samples: int) -> list[av.AudioFrame]:
    seconds = np.arange(num_samples) / SAMPLE_RATE_HZ
    wave = (0.3 * np.sin(2 * np.pi * pitch_hz * seconds)).astype(np.float32)
    frames = []
    for start in range(0, num_samples, AUDIO_FRAME_SAMPLES):
        piece = wave[start : start + AUDIO_FRAME_SAMPLES]
        frame = av.AudioFrame.from_ndarray(np.stack([piece, piece]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = SAMPLE_RATE_HZ, start
        frames.append(frame)
    return frames
