"""Encoding in overlapping tiles and chunks of frames by the model's own code, and how far that is from
encoding the whole clip.

Every seam cuts the context of the convolutions around it: a tile sees zeros where its neighbour is, and a
chunk of a causal model takes its first frame for the beginning of the clip. Blending hides the step and does
not bring the context back, so the result is near the whole one and never equal. How near depends on the
weights, so it is measured and not assumed: by default, the root mean square of the difference may be 0.1 of
the standard deviation of the whole latents. That is 1 % of the latents' power, 20 dB below what a diffusion
model learns and 20 dB below the noise that it sees at a level of 0.5. Shapes: C channels, T frames, H height,
W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from aiprod_ds.config.encode import TilingConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError

# diffusers 0.42.1 asks `use_framewise_decoding` before encoding too (autoencoder_kl_ltx.py, _encode), so both
# are set.
_SWITCHES = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")


def use_tiles(vae: Any, tiling: TilingConfig, strides: ModelStrides) -> None:
    """Makes a VAE of diffusers encode in tiles, and in chunks of frames where these are set.

    Raises:
        ConfigError: If the model cannot, or a size is no multiple of its stride; all problems at once.
    """
    problems = [*_stride_problems(tiling, strides), *_ability_problems(vae, tiling)]
    if problems:
        raise ConfigError(problems)
    sizes = {
        "tile_sample_min_height": tiling.tile.height,
        "tile_sample_min_width": tiling.tile.width,
        "tile_sample_stride_height": tiling.tile.height - tiling.overlap,
        "tile_sample_stride_width": tiling.tile.width - tiling.overlap,
    }
    if tiling.frames is not None and tiling.overlap_frames is not None:
        vae.use_framewise_encoding = vae.use_framewise_decoding = True
        sizes["tile_sample_min_num_frames"] = tiling.frames
        sizes["tile_sample_stride_num_frames"] = tiling.frames - tiling.overlap_frames
    vae.enable_tiling(**sizes)


@contextmanager
def tiles_off(vae: nn.Module) -> Iterator[None]:
    """Encodes whole clips in its body."""
    before = {name: vars(vae)[name] for name in _SWITCHES if name in vars(vae)}
    vars(vae).update(dict.fromkeys(before, False))
    try:
        yield
    finally:
        vars(vae).update(before)


def check_tiles(
    video_CTHW: Tensor,
    tiling: TilingConfig,
    *,
    whole: Callable[[Tensor], Tensor],
    tiled: Callable[[Tensor], Tensor],
) -> float:
    """Returns how far tiled latents are from whole ones, on a part of a clip that has a seam in every
    direction.

        deviation = sqrt(mean((tiled - whole)^2) / mean((whole - mean_c)^2)),  mean_c: of each channel

    Worked number: latents of standard deviation 1 in each channel that are off by 0.05 everywhere deviate by
    0.05.

    Args:
        video_CTHW: [3,T,H,W] in [-1,1]; cut to two tiles and two chunks, so that whole encoding takes a
            bounded memory.
        tiling: What is checked.
        whole: Encodes without tiles.
        tiled: Encodes with tiles.

    Raises:
        ConfigError: If the deviation is above `max_deviation`, or the shapes differ.
    """
    part_CTHW = _with_seams(video_CTHW, tiling)
    expected, found = whole(part_CTHW), tiled(part_CTHW)
    if found.shape != expected.shape:
        raise ConfigError(
            f"video.tiling: must give latents of {list(expected.shape)} as whole encoding does, got "
            f"{list(found.shape)}. "
            "This model's own tiling is broken; remove tiling."
        )
    centred = expected - expected.mean(dim=(1, 2, 3), keepdim=True)
    deviation = float(((found - expected).square().mean() / centred.square().mean()).sqrt())
    if not deviation <= tiling.max_deviation:
        raise ConfigError(
            f"video.tiling: may change latents by {tiling.max_deviation:g} of their standard deviation, got "
            f"{deviation:.3g}. "
            "Enlarge tile, overlap, frames and overlap_frames, or raise max_deviation."
        )
    return deviation


def _with_seams(video_CTHW: Tensor, tiling: TilingConfig) -> Tensor:
    height, width = (2 * size - tiling.overlap for size in (tiling.tile.height, tiling.tile.width))
    frames = video_CTHW.shape[1]
    if tiling.frames is not None and tiling.overlap_frames is not None:
        frames = min(frames, 1 + 2 * tiling.frames - tiling.overlap_frames)
    return video_CTHW[:, :frames, :height, :width]


def _stride_problems(tiling: TilingConfig, strides: ModelStrides) -> Iterator[str]:
    sizes = {"tile.height": tiling.tile.height, "tile.width": tiling.tile.width, "overlap": tiling.overlap}
    frames = {"frames": tiling.frames, "overlap_frames": tiling.overlap_frames}
    for stride, named in ((strides.spatial, sizes), (strides.temporal, frames)):
        for name, size in named.items():
            if size is not None and size % stride:
                yield (
                    f"video.tiling.{name}: must be a multiple of the model's stride {stride}, got {size}. "
                    "Change it."
                )


def _ability_problems(vae: Any, tiling: TilingConfig) -> Iterator[str]:
    name = type(vae).__name__
    enable = getattr(vae, "enable_tiling", None)
    if enable is None or "tile_sample_stride_height" not in inspect.signature(enable).parameters:
        yield (
            f"video.tiling: has no effect for {name}, which cannot encode in tiles of a given size. Remove "
            "it."
        )
    elif (
        tiling.frames is not None
        and "tile_sample_stride_num_frames" not in inspect.signature(enable).parameters
    ):
        yield (
            f"video.tiling.frames: has no effect for {name}, which has no chunks of a given length. Remove "
            "it."
        )
