"""Latents as rows of tokens and back, for any number of axes.

Owns the cutting and nothing about transformers. Called by the families; the trainer adds noise to what comes
out. Shapes: B batch, C latent channels, L tokens, D values per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from aiprod_ds.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrid:
    """The latent that tokens were cut from.

    Attributes:
        latent_shape: Of one sample: [C, frames, height, width] of video, [C, length] or [C, length, bands] of
            sound.
        patch: Latent positions per token along each axis after C.
    """

    latent_shape: tuple[int, ...]
    patch: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens along each axis; time comes first."""
        return tuple(size // patch for size, patch in zip(self.latent_shape[1:], self.patch, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample."""
        return math.prod(self.sizes)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens with the same time."""
        return math.prod(self.sizes[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of a batch.

    Attributes:
        values: [B,L,D], time first and width last along L; the values of a token are ordered channel, time,
            height, width.
        grid: Where they lie; the same for all samples.
    """

    values: Tensor
    grid: TokenGrid


def tokens_of(latents: Tensor, patch: tuple[int, ...]) -> Tokens:
    """Cuts latents into tokens.

    Args:
        latents: [B, C, ...] with one axis after C for each number in `patch`.
        patch: Latent positions per token along each of those axes.

    Raises:
        DataError: If the axes do not fit the patch.
    """
    grid = TokenGrid(latent_shape=tuple(latents.shape[1:]), patch=patch)
    axes = latents.shape[2:]
    if len(axes) != len(patch) or any(
        size < step or size % step for size, step in zip(axes, patch, strict=False)
    ):
        raise DataError(
            f"latents: must be [B, C, ...] with positive multiples of the patch {list(patch)} after C, got "
            f"{list(latents.shape)}. Choose a resolution and a duration that the model can take."
        )
    split = latents.reshape(
        *latents.shape[:2], *(part for pair in zip(grid.sizes, patch, strict=True) for part in pair)
    )
    places, inner = range(2, split.dim(), 2), range(3, split.dim(), 2)
    ordered = split.permute(0, *places, 1, *inner)
    return Tokens(values=ordered.reshape(latents.shape[0], grid.num_tokens, -1), grid=grid)


def latents_of(values_BLD: Tensor, grid: TokenGrid) -> Tensor:
    """Puts tokens together again; the inverse of `tokens_of`.

    Args:
        values_BLD: [B,L,D] as the grid says.
        grid: Where the tokens lie.

    Returns:
        [B, C, ...].
    """
    batch, channels, rank = values_BLD.shape[0], grid.latent_shape[0], len(grid.patch)
    split = values_BLD.reshape(batch, *grid.sizes, channels, *grid.patch)
    pairs = (axis for place in range(rank) for axis in (1 + place, 2 + rank + place))
    return split.permute(0, 1 + rank, *pairs).reshape(batch, *grid.latent_shape)
