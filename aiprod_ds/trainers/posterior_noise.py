"""The noise of a VAE's posterior, drawn where clips are read, so that no update waits for it.

Owns which noise belongs to a clip and how large it is; what is done with it is `aiprod_ds.models.posterior`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.models.posterior import draw_noise
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.rng import stream_seed

_LOG = logging.getLogger(__name__)
_NOISE = "noise/posterior"  # among the tensors of a micro-batch


class PosteriorNoise:
    """Draws for each clip by its place in the global order, whatever the rank and the batch it falls in.

    Args:
        module: Wraps the VAE; asked on the meta device how large its latents are.
        name: Of the clips among the tensors of a micro-batch.
        shapes: Of single clips, one for each bucket.
        dtype: In which the module takes them.
        seed: Of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        shapes: Iterable[tuple[int, ...]],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._name, self._seed = name, seed
        self._latents: dict[tuple[int, ...], tuple[int, ...]] = {}
        blank = on_meta(module)
        for shape in sorted(set(shapes)):
            try:
                with torch.no_grad():
                    _, mean, logvar = blank(torch.zeros(1, *shape, dtype=dtype, device="meta"))
            except Exception as error:  # noqa: BLE001  what a model does without values is its own affair
                # Some make tensors on the CPU inside of forward: their noise is drawn there, too.
                _LOG.info("posterior_noise shape=%s drawn_in=forward because=%r", shape, error)
                continue
            if logvar is not None:
                self._latents[shape] = tuple(mean.shape[1:])

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """Returns the noise of a micro-batch, [B,L,...] fp32 on the CPU; nothing if its size is unknown."""
        latent = self._latents.get(tuple(tensors[self._name].shape[1:]))
        if latent is None:
            return {}
        return {_NOISE: draw_noise(latent, self._seeds(places))}

    def of(self, batch: MicroBatch, phase: int, device: torch.device) -> Tensor | list[int]:
        """Returns what the module takes as noise: that of `draws`, or seeds of the same."""
        if _NOISE in batch.tensors:
            return batch.tensors[_NOISE].to(device, non_blocking=True)
        return self._seeds([(phase, batch.position, sample.ordinal) for sample in batch.samples])

    def _seeds(self, places: Sequence[tuple[int, ...]]) -> list[int]:
        return [stream_seed(self._seed, "posterior", *place) for place in places]
