"""The trainer of latent diffusion transformers, of video or of video and sound: what belongs together, and
what does not fit.

What the loop trains is `diffusion_unit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aiprod_ds.codec.encoders import audio_form
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.encode import AudioEncoderConfig
from aiprod_ds.config.load import found_data
from aiprod_ds.config.model import LoraFileConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.curriculum.plan import snap_notes
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import PlanError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.protocol import Family, require_token_timesteps
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.lora_files import LoraWeights, merge_into, read_lora
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.video_vae import video_strides
from aiprod_ds.planner.evaluations import EvaluationCost, evaluation_cost
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.diffusion_unit import DiffusionUnit, set_adapters, start_adapters
from aiprod_ds.trainers.measures import diffusion_measure_names
from aiprod_ds.trainers.open_data import open_latent_datasets, open_latent_files
from aiprod_ds.trainers.preview_prompts import prompt_bucket, prompt_problems, read_prompts

_ASSUMED_FPS = 24.0  # of clips whose rate nobody says, to estimate how much sound they have


class DiffusionTrainer(Trainer[DiffusionTrainerConfig]):
    """Trains a latent diffusion transformer through a curriculum, all of it or adapters.

    A model that is passed in must be of a known family (`aiprod_ds.models.families`); items of a dataset are
    mappings of latents and embeddings as `TensorLatentDataset` says, and `value_range` has no meaning. The
    arguments are otherwise those of `Trainer`.
    """

    config_class: ClassVar[type[RunConfig]] = DiffusionTrainerConfig

    @cached_property
    def strides(self) -> ModelStrides:
        """How the video VAE divides height, width and frames; found on the meta device."""
        return video_strides(
            build_model(self.config.vae, seed=self.config.seed, device="meta"), self.config.vae
        )

    @cached_property
    def family(self) -> Family:
        """How the model is fed.

        Raises:
            ConfigError: If no family knows it.
        """
        return find_family(self.shapes, self.strides)

    def plan(self, *, world_size: int = 1) -> RunPlan:
        """Returns the curriculum as it would run on `world_size` ranks; takes no memory for weights.

        Raises:
            PlanError: With every problem found, also of the objective.
            ConfigError: If the model is of no known family or the adapters do not fit it.
        """
        plan = super().plan(world_size=world_size)
        problems = list(self._problems(plan))
        if problems:
            raise PlanError([f"{self.source}: {problem}" for problem in problems])
        if self.config.loss.first_frame_probability > 0:
            require_token_timesteps(self.family)
        for phase in plan.phases:  # what does not fit is found before weights are loaded
            transformer = on_meta(self.shapes)
            set_adapters(transformer, self.family, phase, seed=self.config.seed)
            if phase.index == 0:
                model = self.config.model
                _read_lora(model.lora_checkpoint, self.shapes, self.family)
                start_adapters(transformer, _read_lora(model.lora_init, self.shapes, self.family))
        return plan

    def measures(self, plan: RunPlan) -> tuple[str, ...]:  # noqa: ARG002  of every plan the same
        """Returns `diffusion_measure_names`."""
        return diffusion_measure_names(self.family.modalities, self.config.evaluation.noise_levels)

    def evaluation_cost(self, plan: RunPlan) -> EvaluationCost:
        """Returns what the evaluations of the run cost beside training, previews without decoding."""
        config, bucket = self.config, plan.phases[-1].buckets[0]
        clips = [
            _pixels(shape) / _pixels(bucket)
            for entry in read_prompts(config.preview)
            for shape in (prompt_bucket(entry, bucket, strides=self.strides),)
        ]
        clips += [1.0] * min(config.evaluation.num_pictures, config.evaluation.max_clips)
        forwards = config.preview.num_forwards * (2 if config.preview.guidance_scale > 1 else 1)
        turns = -(-len(clips) // plan.world_size)
        busy = turns * plan.world_size / len(clips) if clips else 0.0  # ranks without a clip wait
        return evaluation_cost(
            plan,
            config,
            forwards_per_clip=len(config.evaluation.noise_levels),
            preview_passes=sum(clips) * forwards * busy,
            recompute_default=self._recompute_default(),
        )

    def preview_shapes(self, plan: RunPlan) -> tuple[tuple[str, BucketPlan], ...]:
        """Returns the shapes of own prompts that state one."""
        bucket = plan.phases[-1].buckets[0]
        return tuple(
            (f"preview.prompts[{index}]", prompt_bucket(entry, bucket, strides=self.strides))
            for index, entry in enumerate(read_prompts(self.config.preview))
            if entry.resolution is not None or entry.duration is not None
        )

    def _problems(self, plan: RunPlan) -> Iterator[str]:
        name, modalities, sound = self.family.name, self.family.modalities, self.family.sound
        if sound is not None and self.config.audio_vae is None:
            yield (
                f"audio_vae: must be given for the family {name!r}, which makes sound, got nothing. Name "
                "the latents' VAE."
            )
        if sound is None and self.config.audio_vae is not None:
            yield (
                f"audio_vae: has no effect for the family {name!r}, which makes no sound, got a value. "
                "Remove it."
            )
        if sound is None and self.config.loss.shared_noise_level:
            yield (
                f"loss.shared_noise_level: has no effect for the family {name!r}, which makes no sound, got "
                "true. Remove it."
            )
        if self.value_range is not None:
            yield (
                f"value_range: has no effect for latents, which are normalised, got {self.value_range}. "
                "Remove it."
            )
        if self._model is not None:
            for key in ("lora_checkpoint", "lora_init"):
                if getattr(self.config.model, key) is not None:
                    yield (
                        f"model.{key}: has no effect for a model that is passed in, got a value. Merge it "
                        "before."
                    )
        yield from self._rate_problems()
        prompts, bucket = read_prompts(self.config.preview), plan.phases[-1].buckets[0]
        yield from prompt_problems(prompts, bucket, family=self.family, strides=self.strides)
        for phase in plan.phases:
            if not any(phase.loss_weights[f"{modality}_weight"] > 0 for modality in modalities):
                weights = " or ".join(f"{modality}_weight" for modality in modalities)
                yield f"curriculum.phases[{phase.index}].loss: {weights} must exceed 0, got 0. Raise one."

    def _rate_problems(self) -> Iterator[str]:
        """Positions of sound are in seconds, so transformer and audio VAE must agree on how long a latent
        lasts."""
        sound = self.family.sound
        if self.config.audio_vae is None or sound is None:
            return
        vae = build_model(self.config.audio_vae, seed=self.config.seed, device="meta")
        form = audio_form(vae, AudioEncoderConfig(model=self.config.audio_vae))
        found, expected = form.sample_rate_hz / form.hop, sound.latents_per_second
        if abs(found - expected) > 1e-6 * expected:
            yield (
                f"model.config: {sound.rate_keys} must be the latents per second of audio_vae, {found:g}, "
                f"got {expected:g}. Correct them, or name the VAE that belongs to the model."
            )

    def blank_clip(self, bucket: BucketPlan) -> dict[str, Tensor]:
        """Returns latents and a prompt of `Family.text_tokens` tokens."""
        family, strides = self.family, self.strides
        picture = (bucket.height // strides.spatial, bucket.width // strides.spatial)
        shapes: dict[str, tuple[int, ...]] = {
            "latents": (
                family.token_width // math.prod(family.patch),
                strides.latents(bucket.frames),
                *picture,
            ),
            "prompt_embeds": (family.text_tokens, family.text_width),
        }
        if (sound := family.sound) is not None:
            seconds = bucket.frames / (bucket.frame_rate_hz or _ASSUMED_FPS)
            num_latents = max(1, round(seconds * sound.latents_per_second))
            shapes["audio_latents"] = (sound.token_width, num_latents)
            shapes["audio_prompt_embeds"] = (family.text_tokens, sound.text_width)
        clip = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()
        }
        return clip | {"fps": torch.tensor(_ASSUMED_FPS)}

    def _open_datasets(self, dataset: Any, validation: Any) -> ClipData:
        return open_latent_datasets(
            dataset,
            validation,
            strides=self.strides,
            seed=self.config.seed,
            held_out=self._what_is_held_out(),
        )

    def _open_files(self) -> ClipData:
        has_sound = self.family.sound is not None
        found = self.config.model_copy(update={"data": found_data(self.config.data, self.source)})
        return open_latent_files(found, strides=self.strides, with_audio=has_sound)

    def build_unit(
        self,
        config: DiffusionTrainerConfig,
        *,
        model: nn.Module,
        plan: RunPlan,
        data: ClipData,
        too_short: tuple[TooShort, ...],
    ) -> DiffusionUnit:
        """Returns `build_diffusion_unit` with the video VAE's strides."""
        return build_diffusion_unit(
            config, model=model, plan=plan, data=data, too_short=too_short, strides=self.strides
        )


def _pixels(bucket: BucketPlan) -> int:
    return bucket.frames * bucket.height * bucket.width


def build_diffusion_unit(
    config: DiffusionTrainerConfig,
    *,
    model: nn.Module,
    plan: RunPlan,
    data: ClipData,
    too_short: tuple[TooShort, ...],
    strides: ModelStrides,
) -> DiffusionUnit:
    """Returns what the loop trains, with the LoRA in it that `config` merges; arguments as
    `Trainer.build_unit` says, and the strides of the video VAE."""
    family = find_family(model, strides)
    started_with = _read_lora(config.model.lora_init, model, family)
    merged = _read_lora(config.model.lora_checkpoint, model, family)
    if merged is not None:
        merge_into(model, merged)
    return DiffusionUnit(
        config=config,
        plan=plan,
        data=data,
        too_short=too_short,
        snapped=snap_notes(plan, strides),
        module=DiffusionModule(model, family),
        strides=strides,
        started_with=started_with,
    )


def _read_lora(file: LoraFileConfig | None, model: nn.Module, family: Family) -> LoraWeights | None:
    return None if file is None else read_lora(Path(file.path), model, family, alpha=file.alpha)
