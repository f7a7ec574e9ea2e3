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
from aiprod_ds.losses.flow import FlowSample, bucket_terms, draw_noise, first_frame_mask, flow_losses, noised
from aiprod_ds.losses.noise_level import draw_noise_levels
from aiprod_ds.losses.terms import LossSum, LossTerms
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.tokens import Tokens
from aiprod_ds.rng import stream_seed

# Names of what is drawn among the tensors of a micro-batch; no file of latents has a slash in its names.
_NOISE, _LEVEL, _GIVEN = "noise/", "noise_level/", "given/video"
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

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """Returns what chance adds to a micro-batch: noise, noise levels and given first frames, on the CPU.

        Drawn where clips are read, beside training, so that no update waits for it; from streams of each
        sample's own, so that neither rank nor world size nor number of workers matters.

        Args:
            tensors: As `LatentDataset` gives them, stacked.
            places: Of each sample in the global order.
        """
        tokens = self.family.tokens(tensors)
        drawn: dict[str, Tensor] = {}
        for modality, part in tokens.items():
            shape_LC, seeds = part.values.shape[1:], self._seeds("noise", modality, places)
            drawn[_NOISE + modality] = draw_noise(shape_LC, seeds=seeds)
            drawn[_LEVEL + modality] = self._levels(modality, tokens, places)
        if self.config.first_frame_probability > 0 and "video" in tokens:
            drawn[_GIVEN] = self._given_first_frames(tokens["video"], places)
        return drawn

    def loss(
        self, engine: Engine, tensors: Mapping[str, Tensor], *, weights: Mapping[str, float]
    ) -> LossTerms:
        """Returns the weighted loss of one micro-batch, and of every modality its loss and the means of its
        four noise levels.

        Args:
            engine: Holds a `DiffusionModule`.
            tensors: As `LatentDataset` gives them, stacked, and their `draws`, on the engine's device.
            weights: `<modality>_weight` of the phase.
        """
        tokens = self.family.tokens(tensors)
        samples = {
            modality: noised(
                part.values,
                tensors[_LEVEL + modality],
                tensors[_NOISE + modality],
                is_clean_BL=tensors.get(_GIVEN) if modality == "video" else None,
            )
            for modality, part in tokens.items()
        }
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
        samples = {}
        for modality, part in tokens.items():
            seed = stream_seed(_EVALUATION_SEED, "evaluation_noise", modality, place)
            samples[modality] = noised(part.values, level_B, draw_noise(part.values.shape[1:], seeds=[seed]))
        return samples, self._predict(engine, samples, tensors, tokens)

    def _levels(
        self, modality: str, tokens: Mapping[str, Tokens], places: Sequence[tuple[int, ...]]
    ) -> Tensor:
        stream = "video" if self.config.shared_noise_level else modality
        num_tokens = [tokens[stream].grid.num_tokens] * len(places)
        return draw_noise_levels(
            self.config.noise_level, num_tokens=num_tokens, seeds=self._seeds("noise_level", stream, places)
        )

    def _given_first_frames(self, video: Tokens, places: Sequence[tuple[int, ...]]) -> Tensor:
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
