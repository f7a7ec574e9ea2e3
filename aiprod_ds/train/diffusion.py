"""The trainer of latent diffusion transformers, of video or of video and sound: what is trained, its loss, its held-out measures.

The loop is `aiprod_ds.train.loop`; the objective on one batch is `diffusion_objective`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.encode import AudioEncoderConfig
from aiprod_ds.config.lora import LoraFileConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.curriculum.plan import ModelStrides, snap_notes
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine import dist
from aiprod_ds.engine.carried import CarriedValues
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.losses import LossTerms
from aiprod_ds.models.diffusion import TRANSFORMER, DiffusionModule
from aiprod_ds.models.families.protocol import Family, require_token_timesteps
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.lora_files import LoraWeights, merge_into, read_lora
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.video_vae import video_strides
from aiprod_ds.train.clip_data import ClipData
from aiprod_ds.train.clip_unit import ClipUnit
from aiprod_ds.train.decoding import LatentDecoder
from aiprod_ds.train.diffusion_export import export_transformer
from aiprod_ds.train.diffusion_objective import FlowObjective
from aiprod_ds.train.encode_models import audio_form
from aiprod_ds.train.held_out import held_out_turns
from aiprod_ds.train.latent_data import open_latent_datasets, open_latent_files, read_empty_prompt
from aiprod_ds.train.preview import Previews
from aiprod_ds.train.trainer import Trainer
from aiprod_ds.train.unit import Evaluation, Examples

_PROBE_LEVEL = 0.5


class DiffusionTrainer(Trainer[DiffusionTrainerConfig]):
    """Trains a latent diffusion transformer through a curriculum, all of it or adapters.

    A model that is passed in must be of a known family (`aiprod_ds.models.families`); items of a dataset are what
    `TensorLatentDataset` says. The arguments are those of `Trainer`.
    """

    @cached_property
    def strides(self) -> ModelStrides:
        """How the video VAE divides height, width and frames; found on the meta device."""
        return video_strides(build_model(self.config.vae, seed=self.config.seed, device="meta"), self.config.vae)

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
            _set_adapters(transformer, self.family, phase, seed=self.config.seed)
            if phase.index == 0:
                self._read_lora(self.config.model.lora_checkpoint, self.shapes)
                _start_adapters(transformer, self._read_lora(self.config.model.lora_init, self.shapes))
        return plan

    def _problems(self, plan: RunPlan) -> Iterator[str]:
        name, modalities = self.family.name, self.family.modalities
        if "audio" in modalities and self.config.audio_vae is None:
            yield f"audio_vae: must be given for the family {name!r}, which makes sound, got nothing. Name the latents' VAE."
        if "audio" not in modalities and self.config.audio_vae is not None:
            yield f"audio_vae: has no effect for the family {name!r}, which makes no sound, got a value. Remove it."
        if "audio" not in modalities and self.config.loss.shared_noise_level:
            yield f"loss.shared_noise_level: has no effect for the family {name!r}, which makes no sound, got true. Remove it."
        if self._model is not None:
            for key in ("lora_checkpoint", "lora_init"):
                if getattr(self.config.model, key) is not None:
                    yield f"model.{key}: has no effect for a model that is passed in, got a value. Merge it before."
        yield from self._rate_problems()
        for phase in plan.phases:
            if not any(phase.loss_weights[f"{modality}_weight"] > 0 for modality in modalities):
                weights = " or ".join(f"{modality}_weight" for modality in modalities)
                yield f"curriculum.phases[{phase.index}].loss: {weights} must exceed 0, got 0. Raise one."

    def _rate_problems(self) -> Iterator[str]:
        """Positions of sound are in seconds, so transformer and audio VAE must agree on how long a latent lasts."""
        expected = getattr(self.family, "audio_latents_per_second", None)
        if self.config.audio_vae is None or expected is None:
            return
        vae = build_model(self.config.audio_vae, seed=self.config.seed, device="meta")
        form = audio_form(vae, AudioEncoderConfig(model=self.config.audio_vae))
        found = form.sample_rate_hz / form.hop
        if abs(found - expected) > 1e-6 * expected:
            yield (
                f"model.config: audio_sampling_rate / audio_hop_length / audio_scale_factor must be the latents per second of "
                f"audio_vae, {found:g}, got {expected:g}. Correct them, or name the VAE that belongs to the model."
            )

    def _open_datasets(self, dataset: Any, validation: Any) -> ClipData:
        return open_latent_datasets(dataset, validation, strides=self.strides)

    def _open_files(self) -> ClipData:
        return open_latent_files(self.config, strides=self.strides, with_audio="audio" in self.family.modalities)

    def _unit(self, model: nn.Module, plan: RunPlan, data: ClipData, too_short: tuple[TooShort, ...]) -> DiffusionUnit:
        started_with = self._read_lora(self.config.model.lora_init, model)
        merged = self._read_lora(self.config.model.lora_checkpoint, model)
        if merged is not None:
            merge_into(model, merged)
        return DiffusionUnit(
            config=self.config,
            plan=plan,
            data=data,
            too_short=too_short,
            snapped=snap_notes(plan, self.strides),
            module=DiffusionModule(model, self.family),
            started_with=started_with,
        )

    def _read_lora(self, file: LoraFileConfig | None, model: nn.Module) -> LoraWeights | None:
        return None if file is None else read_lora(Path(file.path), model, self.family, alpha=file.alpha)


@dataclass(slots=True, kw_only=True)
class DiffusionUnit(ClipUnit):
    """What the loop trains; a `Unit`.

    Attributes:
        started_with: What the adapters of the first phase go on from; None if they start with no effect.
    """

    config: DiffusionTrainerConfig
    module: DiffusionModule
    started_with: LoraWeights | None = None
    _objective: FlowObjective = field(init=False)
    _decoder: LatentDecoder = field(init=False)
    _previews: Previews | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Reads what can be missing before training."""
        config, family = self.config, self.module.family
        self._objective = FlowObjective(family=family, config=config.loss, seed=config.seed)
        self._require_fitting_latents()
        self._decoder = LatentDecoder(config.vae, config.audio_vae, config.preview, seed=config.seed)
        if config.evaluation.num_pictures:
            empty_prompt = read_empty_prompt(self.data)
            self._previews = Previews(
                config.preview, family=family, decoder=self._decoder, empty_prompt=empty_prompt, seed=config.seed
            )

    def prepare(self, phase: PhasePlan) -> None:
        """Makes the transformer have the adapters that `phase` trains, or none; weights stay as they are."""
        _set_adapters(self.module.transformer, self.module.family, phase, seed=self.config.seed)
        if phase.index == 0:
            _start_adapters(self.module.transformer, self.started_with)

    def carried(self, engine: Engine) -> CarriedValues:
        """Returns W + scale * B A in fp32 of every wrapped layer, by its name in the plain transformer. Collective."""
        from aiprod_ds.models.lora import adapter_names  # imports peft, which takes seconds

        values = CarriedValues()
        for names in adapter_names(self.module.transformer):
            base, down, up = (engine.read_value(f"{TRANSFORMER}{name}") for name in (names.base, names.down, names.up))
            values.add(names.plain, base + names.scale * (up @ down))
        return values

    def written(self, carried: CarriedValues) -> Iterator[tuple[str, Tensor]]:
        """Yields what was carried by the names in the module as it is now. Collective."""
        from aiprod_ds.models.lora import adapter_names  # imports peft, which takes seconds

        wrapped = {names.plain: names.base for names in adapter_names(self.module.transformer)}
        for name, value in carried.whole():
            yield f"{TRANSFORMER}{wrapped.get(name, name)}", value

    def probe(self, engine: Engine) -> Tensor:
        """Returns the velocities that the transformer predicts for the first held-out clip, half noised, in one vector."""
        engine.eval()
        bucket = self.plan.phases[-1].buckets[0]
        item = self.data.held_out_clip(self.data.held_out(bucket)[0], bucket)
        tensors = _on_device({name: tensor[None] for name, tensor in item.items()}, engine.device)
        answer = self._objective.answer(engine, tensors, place=0, noise_level=_PROBE_LEVEL)
        engine.train()
        return torch.cat([answer[modality].float().flatten().cpu() for modality in self.module.family.modalities])

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Noises one micro-batch and compares velocities; every draw depends on a clip's place in the global order."""
        places = [(phase.index, batch.position, sample.ordinal) for sample in batch.samples]
        tensors = _on_device(batch.tensors, engine.device)
        return self._objective.loss(engine, tensors, places=places, weights=phase.loss_weights)

    def evaluate(self, engine: Engine) -> Evaluation:
        """Measures held-out clips in the last phase's shape at the configured noise levels, spread over ranks; makes previews."""
        bucket, settings = self.plan.phases[-1].buckets[0], self.config.evaluation
        levels, modalities = settings.noise_levels, self.module.family.modalities
        sums_ML = torch.zeros(len(modalities), len(levels), dtype=torch.float64)
        count = 0
        for turn in held_out_turns(engine, self.data, bucket, max_clips=settings.max_clips):
            tensors = _on_device({name: tensor[None] for name, tensor in turn.item.items()}, engine.device)
            for column, level in enumerate(levels):
                found = self._objective.held_out(engine, tensors, place=turn.place, noise_level=level)
                if turn.is_own:
                    sums_ML[:, column] += torch.tensor([found[modality] for modality in modalities], dtype=torch.float64)
            count += turn.is_own
        means_ML = _mean_over_ranks(sums_ML, count, engine)
        metrics = _measures(means_ML, modalities, levels, self.plan.phases[-1].loss_weights)
        return Evaluation(metrics=metrics, headline=f"loss {metrics['loss']:.4f}", examples=self._make_previews(engine))

    def export(self, engine: Engine, folder: Path) -> None:
        """Writes the trained model in diffusers' layout, or the adapters in PEFT's and ComfyUI's.

        Beside adapters stands the model that they belong to if this run has trained that too.
        """
        last = self.plan.phases[-1].adapters
        has_new_base = any(phase.adapters != last for phase in self.plan.phases)
        export_transformer(engine, self.module, folder, lora=last, with_base=has_new_base)

    def replacements(self) -> tuple[str, ...]:
        """Returns snapped frame counts, clips that do not fit their bucket, and what stands in for a missing vocoder."""
        decoding = self._decoder.replacements() if self.config.evaluation.num_pictures else ()
        return (*self.snapped, *decoding, *self.data.replacements(self.plan))

    def _make_previews(self, engine: Engine) -> Examples | None:
        if self._previews is None:
            return None
        bucket, settings = self.plan.phases[-1].buckets[0], self.config.evaluation
        shown = self.data.held_out(bucket)[: min(settings.num_pictures, settings.max_clips)]
        return self._previews.make(engine, [self.data.held_out_clip(index, bucket) for index in shown])

    def _require_fitting_latents(self) -> None:
        """Finds latents of other channels or another size than the model and the phases take, before anything is written.

        Raises:
            PlanError: If the first held-out clip does not fit.
        """
        bucket = self.plan.phases[-1].buckets[0]
        try:
            item = self.data.held_out_clip(self.data.held_out(bucket)[0], bucket)
            self.module.family.tokens({name: tensor[None] for name, tensor in item.items()})
        except DataError as error:
            raise PlanError(f"data: {error}") from error


def _set_adapters(transformer: nn.Module, family: Family, phase: PhasePlan, *, seed: int) -> None:
    if phase.adapters is None and not hasattr(transformer, "peft_config"):
        transformer.requires_grad_(True)
        return
    from aiprod_ds.models.lora import add_lora, remove_lora  # imports peft, which takes seconds

    remove_lora(transformer)
    if phase.adapters is not None:
        add_lora(transformer, phase.adapters, allowed=family.lora_targets, seed=seed)


def _start_adapters(transformer: nn.Module, lora: LoraWeights | None) -> None:
    if lora is not None:
        from aiprod_ds.models.lora import start_from  # imports peft, which takes seconds

        start_from(transformer, lora)


def _on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _mean_over_ranks(sums_ML: Tensor, count: int, engine: Engine) -> Tensor:
    own = torch.cat([sums_ML.flatten(), torch.tensor([count], dtype=torch.float64)]).to(engine.device)
    *sums, total = dist.reduce_mean(own).tolist()
    means_ML: Tensor = torch.tensor(sums, dtype=torch.float64).view_as(sums_ML) / total
    return means_ML


def _measures(
    means_ML: Tensor, modalities: tuple[str, ...], levels: tuple[float, ...], weights: Mapping[str, float]
) -> dict[str, float]:
    """Returns the weighted loss, of each modality the mean over levels, and each level's."""
    each = {modality: means_ML[row] for row, modality in enumerate(modalities)}
    measures = {"loss": sum(weights[f"{modality}_weight"] * float(means.mean()) for modality, means in each.items())}
    measures |= {f"{modality}_loss": float(means.mean()) for modality, means in each.items()}
    for modality, means in each.items():
        measures |= {f"{modality}_loss_at_{level:g}": float(value) for level, value in zip(levels, means, strict=True)}
    return measures
