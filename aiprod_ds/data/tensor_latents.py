"""A user's own dataset of latents, answering the requests that folders of latents answer.

Shapes: C channels, F frames, H height, W width, S tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.dataset import ClipRequest, ItemDataset, MapDataset
from aiprod_ds.data.own.items import LATENTS, latents_of
from aiprod_ds.errors import DataError

_DEFAULT_FPS = 24.0


class LatentItems:
    """Reads items whose latents all have the shape that the phases ask for.

    Args:
        strides: Of the video VAE that encoded: what pixels and frames a latent of some shape stands for.
    """

    kind = LATENTS
    value_range = None

    def __init__(self, *, strides: ModelStrides) -> None:
        self._strides = strides

    def values(self, item: Any, name: str) -> Tensor:
        """See `ItemReader.values`."""
        return latents_of(item, name)["latents"]

    def facts(self, item: Any, name: str) -> ClipFacts:
        """See `ItemReader.facts`."""
        tensors = _read(item, name)
        _, latent_frames, height, width = tensors["latents"].shape
        frames = 1 + (latent_frames - 1) * self._strides.temporal
        return ClipFacts(
            name=name,
            frames=frames,
            seconds=frames / float(tensors["fps"]),
            height=height * self._strides.spatial,
            width=width * self._strides.spatial,
        )

    def clip(self, item: Any, request: ClipRequest, name: str) -> dict[str, Tensor]:
        """See `ItemReader.clip`: the item's tensors.

        Raises:
            DataError: If the item is no mapping with latents, or they have another shape than is asked for.
        """
        tensors, strides = _read(item, name), self._strides
        wanted = (
            strides.latents(request.frames),
            request.height // strides.spatial,
            request.width // strides.spatial,
        )
        if tuple(tensors["latents"].shape[1:]) != wanted:
            raise DataError(
                f"{name}: must have latents of {wanted[0]} frames of {wanted[1]}x{wanted[2]} for this "
                f"phase, got {list(tensors['latents'].shape)}. Choose resolution and duration to fit, or "
                "other items."
            )
        return tensors


class TensorLatentDataset(ItemDataset):
    """Map-style items whose latents all have the shape that the phases ask for.

    Args:
        dataset: Items are mappings with normalised `latents` [C,F,H,W], `prompt_embeds` [S,D], and where the
            model takes them `audio_latents`, `prompt_attention_mask` [S] bool and `audio_prompt_embeds`;
            `fps` is 24 where it is missing.
        strides: Of the video VAE that encoded.
    """

    def __init__(self, dataset: MapDataset, *, strides: ModelStrides) -> None:
        super().__init__(dataset, LatentItems(strides=strides))


def _read(item: Any, name: str) -> dict[str, Tensor]:
    tensors = latents_of(item, name)
    fps = item.get("fps", _DEFAULT_FPS)
    return {**tensors, "fps": torch.as_tensor(fps, dtype=torch.float32)}
