"""What a video VAE's evaluation shows: originals over reconstructions as a picture, and each as a film.

Owns what of a clip travels to the main rank, and the files there. Called by the video VAE's unit. Shape
suffixes: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aiprod_ds.media.clips import make_clip
from aiprod_ds.media.pictures import save_comparison
from aiprod_ds.metrics.evaluations import Medium

_SHOWN_FRAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShownPair:
    """A held-out clip and its reconstruction, small enough to travel between processes.

    Attributes:
        original: Some frames, [1, 3, T, H, W] in [-1, 1] on the CPU.
        reconstruction: The same frames.
        films: MP4 files of all frames of both.
    """

    original: Tensor
    reconstruction: Tensor
    films: tuple[bytes, bytes]


def shown_pair(original_BCTHW: Tensor, output_BCTHW: Tensor, *, frame_rate_hz: float) -> ShownPair:
    """Returns what is shown of a clip (batch 1); the films are encoded here, on every rank its own."""
    films = [make_clip(video[0], frame_rate_hz=frame_rate_hz).mp4 for video in (original_BCTHW, output_BCTHW)]
    return ShownPair(
        original=_some_frames(original_BCTHW),
        reconstruction=_some_frames(output_BCTHW),
        films=(films[0], films[1]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoExamples:
    """An `Examples`.

    Attributes:
        sources: Names of the clips, in the order of `pairs`; there may be more.
    """

    pairs: tuple[ShownPair, ...]
    sources: tuple[str, ...]

    def save(self, folder: Path, name: str, *, title: str, moment: str) -> tuple[Medium, ...]:
        """Writes `<name>.png`, `<name>_clip_1.mp4` and so on, and the originals' films."""
        originals = torch.cat([pair.original for pair in self.pairs])
        reconstructions = torch.cat([pair.reconstruction for pair in self.pairs])
        save_comparison(originals, reconstructions, folder / f"{name}.png", title=title)
        media = [Medium(path=f"{folder.name}/{name}.png", kind="picture", role="sheet", caption=title)]
        for number, (pair, source) in enumerate(zip(self.pairs, self.sources, strict=False), start=1):
            original, film = f"original_clip_{number}.mp4", f"{name}_clip_{number}.mp4"
            (folder / original).write_bytes(pair.films[0])
            (folder / film).write_bytes(pair.films[1])
            media += [
                Medium(
                    path=f"{folder.name}/{original}",
                    kind="film",
                    role="original",
                    caption=f"clip {number}, original",
                    clip=number,
                    source=source,
                ),
                Medium(
                    path=f"{folder.name}/{film}",
                    kind="film",
                    role="reconstruction",
                    caption=f"clip {number}, {moment}",
                    clip=number,
                    source=source,
                ),
            ]
        return tuple(media)


def _some_frames(video_BCTHW: Tensor) -> Tensor:
    frames = (
        torch.linspace(0, video_BCTHW.shape[2] - 1, min(_SHOWN_FRAMES, video_BCTHW.shape[2])).round().long()
    )
    return video_BCTHW[:, :, frames].cpu()
