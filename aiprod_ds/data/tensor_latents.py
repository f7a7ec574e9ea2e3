"""A user's own dataset of latents, answering the requests that folders of latents answer.

Shapes: C channels, F frames, H height, W width, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.dataset import ClipRequest, MapDataset
from aiprod_ds.errors import DataError

_DEFAULT_FPS = 24.0


class TensorLatentDataset:
    """Map-style items whose latents all have the shape that the phases ask for.

    Args:
        dataset: Items are mappings with normalised `latents` [C,F,H,W], `prompt_embeds` [S,D], and where the
            model takes them `audio_latents`, `prompt_attention_mask` [S] bool and `audio_prompt_embeds`;
            `fps` is 24 where it is missing.
        strides: Of the video VAE that encoded: what pixels and frames a latent of some shape stands for.
    """

    def __init__(self, dataset: MapDataset, *, strides: ModelStrides) -> None:
        self._dataset = dataset
        self._strides = strides

    def __len__(self) -> int:
        """Returns the number of items."""
        return len(self._dataset)

    def __getitem__(self, request: ClipRequest) -> dict[str, Tensor]:
        """See `ClipSource.__getitem__`: the item's tensors.

        Raises:
            DataError: If the item is no mapping with latents, or they have another shape than is asked for.
        """
        item = self._item(request.sample_index)
        strides = self._strides
        wanted = (
            strides.latents(request.frames),
            request.height // strides.spatial,
            request.width // strides.spatial,
        )
        if tuple(item["latents"].shape[1:]) != wanted:
            raise DataError(
                f"dataset[{request.sample_index}]: must have latents of {wanted[0]} frames of "
                f"{wanted[1]}x{wanted[2]} for this "
                f"phase, got {list(item['latents'].shape)}. Choose resolution and duration to fit, or other "
                "items."
            )
        return item

    def lengths(self) -> list[ClipFacts]:
        """See `ClipDataset.lengths`; every call reads each item once."""
        return [self._facts(index) for index in range(len(self._dataset))]

    def _facts(self, index: int) -> ClipFacts:
        item = self._item(index)
        _, latent_frames, height, width = item["latents"].shape
        frames = 1 + (latent_frames - 1) * self._strides.temporal
        return ClipFacts(
            name=f"dataset[{index}]",
            frames=frames,
            seconds=frames / float(item["fps"]),
            height=height * self._strides.spatial,
            width=width * self._strides.spatial,
        )

    def _item(self, index: int) -> dict[str, Tensor]:
        found: Any = self._dataset[index]
        latents = found.get("latents") if isinstance(found, Mapping) else None
        if not isinstance(latents, Tensor) or latents.dim() != 4:
            raise DataError(
                f"dataset[{index}]: must be a mapping with latents [C,F,H,W], got "
                f"{type(found).__name__ if latents is None else list(getattr(latents, 'shape', ()))}. "
                "Return one."
            )
        fps = torch.as_tensor(found.get("fps", _DEFAULT_FPS), dtype=torch.float32)
        return {**{name: value for name, value in found.items() if isinstance(value, Tensor)}, "fps": fps}
