"""The diffusion loss on a batch of latents, in training and at fixed noise levels: between `Family` and
`aiprod_ds.losses.flow`.

Owns which random stream each draw comes from and what the engine is handed. Shape suffixes: B batch, L
tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.config.losses import FlowConfig
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.losses.flow import FlowSample, bucket_terms, first_frame_mask, flow_losses, noised
from aiprod_ds.losses.noise_level import draw_noise_levels
from aiprod_ds.losses.terms import LossSum, LossTerms
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.tokens import Tokens
from aiprod_ds.rng import stream_seed

_EVALUATION_SEED = 0  # not the run's, so that runs of different seeds are measured with the same noise


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowObjective:
    """What a diffusion transformer is trained and measured by.

    Attributes:
        family: Of the transformer.
        config: The section `loss`.
        seed: The run's seed.
    """

    family: Family
    config: FlowConfig
    seed: int

    def loss(
        self,
        engine: Engine,
        tensors: Mapping[str, Tensor],
        *,
        places: Sequence[tuple[int, ...]],
        weights: Mapping[str, float],
    ) -> LossTerms:
        """Returns the weighted loss of one micro-batch, and of every modality its loss and the means of its
        four noise levels.

        Args:
            engine: Holds a `DiffusionModule`.
            tensors: As `LatentDataset` gives them, stacked, on the engine's device.
            places: Of each sample in the global order; every draw depends on it alone, so neither on rank nor
                on world size.
            weights: `<modality>_weight` of the phase.
        """
        tokens = self.family.tokens(tensors)
        samples = self._samples(tokens, places)
        predicted = self._predict(engine, samples, tensors, tokens)
        total = LossSum()
        for modality, sample in samples.items():
            losses_B = flow_losses(predicted[modality], sample)
            total.add(f"loss/{modality}", weights[f"{modality}_weight"], losses_B.mean())
            for name, value in bucket_terms(modality, losses_B, sample.noise_levels).items():
                total.measure(name, value)
        return total.finish()

    @torch.no_grad()
    def held_out(
        self, engine: Engine, tensors: Mapping[str, Tensor], *, place: int, noise_level: float
    ) -> dict[str, float]:
        """Returns the loss of each modality of one held-out clip (batch 1), all modalities at `noise_level`.

        The noise depends on the clip's place and on nothing else: it is the same at every level, in every run
        and for every world size.
        """
        samples, predicted = self._held_out(engine, tensors, place=place, noise_level=noise_level)
        return {
            modality: float(flow_losses(predicted[modality], sample)) for modality, sample in samples.items()
        }

    @torch.no_grad()
    def answer(
        self, engine: Engine, tensors: Mapping[str, Tensor], *, place: int, noise_level: float
    ) -> dict[str, Tensor]:
        """Returns the velocities [1,L,D] that `held_out` measures."""
        _, predicted = self._held_out(engine, tensors, place=place, noise_level=noise_level)
        return predicted

    def _held_out(
        self, engine: Engine, tensors: Mapping[str, Tensor], *, place: int, noise_level: float
    ) -> tuple[dict[str, FlowSample], dict[str, Tensor]]:
        tokens = self.family.tokens(tensors)
        level_B = torch.tensor([noise_level])
        samples = {
            modality: noised(
                part.values,
                level_B,
                seeds=[stream_seed(_EVALUATION_SEED, "evaluation_noise", modality, place)],
            )
            for modality, part in tokens.items()
        }
        return samples, self._predict(engine, samples, tensors, tokens)

    def _samples(
        self, tokens: Mapping[str, Tokens], places: Sequence[tuple[int, ...]]
    ) -> dict[str, FlowSample]:
        samples = {}
        for modality, part in tokens.items():
            is_clean_BL = self._given_first_frames(part, places) if modality == "video" else None
            seeds = self._seeds("noise", modality, places)
            samples[modality] = noised(
                part.values, self._levels(modality, tokens, places), seeds=seeds, is_clean_BL=is_clean_BL
            )
        return samples

    def _levels(
        self, modality: str, tokens: Mapping[str, Tokens], places: Sequence[tuple[int, ...]]
    ) -> Tensor:
        stream = "video" if self.config.shared_noise_level else modality
        num_tokens = [tokens[stream].grid.num_tokens] * len(places)
        return draw_noise_levels(
            self.config.noise_level, num_tokens=num_tokens, seeds=self._seeds("noise_level", stream, places)
        )

    def _given_first_frames(self, video: Tokens, places: Sequence[tuple[int, ...]]) -> Tensor | None:
        if self.config.first_frame_probability == 0:
            return None
        return first_frame_mask(
            self.config.first_frame_probability,
            num_frames=video.grid.sizes[0],
            tokens_per_frame=video.grid.tokens_per_frame,
            seeds=self._seeds("first_frame", "video", places),
        )

    def _predict(
        self,
        engine: Engine,
        samples: Mapping[str, FlowSample],
        tensors: Mapping[str, Tensor],
        tokens: Mapping[str, Tokens],
    ) -> dict[str, Tensor]:
        is_per_token = self.config.first_frame_probability > 0
        noisy = {modality: sample.noisy.to(engine.compute_dtype) for modality, sample in samples.items()}
        timesteps = {
            # One level for all tokens of a sample is cheaper: the modulation is then computed once for each
            # sample.
            modality: sample.timesteps if is_per_token else sample.noise_levels.unsqueeze(1)
            for modality, sample in samples.items()
        }
        grids = {modality: part.grid for modality, part in tokens.items()}
        predicted: dict[str, Tensor] = engine(noisy, timesteps, tensors, grids)
        return predicted

    def _seeds(self, stream: str, modality: str, places: Sequence[tuple[int, ...]]) -> list[int]:
        return [stream_seed(self.seed, stream, modality, *place) for place in places]
