"""The audio VAE trainer: what is trained, on what, and its held-out measures. The loop is
`aiprod_ds.train.loop`.

Shape suffixes: B batch, C channels, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.load import found_data
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.plan import snap_notes
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import PlanError
from aiprod_ds.losses import LossTerms
from aiprod_ds.metrics.listening import Visqol
from aiprod_ds.models.audio_vae import AudioVAE, audio_facts, audio_strides, wrap_audio_vae
from aiprod_ds.models.discriminators.judgement import audio_discriminators
from aiprod_ds.models.mel_vae import MelVAE, is_mel_model
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.train.unit import Companion, Evaluation, EvaluationRequest
from aiprod_ds.trainers.adversarial.adversary import Adversary
from aiprod_ds.trainers.adversarial.opening import adversary_problems, choose_last_layer, open_adversary
from aiprod_ds.trainers.audio_objective import Objective, choose_objective, objective_problems
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.clip_unit import ClipUnit
from aiprod_ds.trainers.evaluation import (
    NOTHING_READ,
    HeldOutClip,
    gather_shown,
    held_out_clips,
    without_unread,
)
from aiprod_ds.trainers.measures import audio_measure_names, audio_measure_problems, judged
from aiprod_ds.trainers.open_data import open_audio_datasets, open_audio_files
from aiprod_ds.trainers.posterior_noise import PosteriorNoise
from aiprod_ds.trainers.stages.parts import TrainedParts, answer
from aiprod_ds.trainers.stages.rules import stage_problems
from aiprod_ds.trainers.vae_export import export_vae


class AudioVAETrainer(Trainer[AudioVAETrainerConfig]):
    """Trains an audio VAE through a curriculum.

    A model that is passed in must offer what `AudioVAE` says, or `MelVAE` for models of mel spectrograms;
    items of a dataset are what `AudioItems` reads: sounds [N] or [C, N], floating in `value_range` or int16,
    or dicts with 'audio' and optionally 'sample_rate_hz'. The arguments are those of `Trainer`.
    """

    config_class: ClassVar[type[RunConfig]] = AudioVAETrainerConfig

    @cached_property
    def strides(self) -> ModelStrides:
        """How many samples become one latent; found on the meta device."""
        return audio_strides(self.shapes, self.config.model)

    def plan(self, *, world_size: int = 1) -> RunPlan:
        """Returns the curriculum as it would run on `world_size` ranks; takes no memory for weights.

        Raises:
            PlanError: With every problem found, also if the model takes another rate or number of channels
                than the data has.
        """
        plan = super().plan(world_size=world_size)
        problems = [
            *self._form_problems(),
            *objective_problems(self.config.loss, plan, is_mel=is_mel_model(self.shapes)),
            *audio_measure_problems(self.config, plan, is_mel=is_mel_model(self.shapes)),
            *self._stage_problems(plan),
            *self._adversary_problems(plan),
        ]
        if problems:
            raise PlanError([f"{self.source}: {problem}" for problem in problems])
        return plan

    def measures(self, plan: RunPlan) -> tuple[str, ...]:  # noqa: ARG002  of every plan the same
        """Returns `audio_measure_names`."""
        return audio_measure_names(self.config, is_mel=is_mel_model(self.shapes))

    def _stage_problems(self, plan: RunPlan) -> Iterator[str]:
        module = wrap_audio_vae(on_meta(self.shapes))
        clip = self.blank_clip(plan.phases[0].buckets[0])["audio"].unsqueeze(0)
        if not isinstance(module, MelVAE):  # whose front end takes fp32 whatever its weights are
            clip = clip.to(next(module.parameters()).dtype)
        yield from stage_problems(self.config.loss, plan, module=module, clip=clip)

    def _adversary_problems(self, plan: RunPlan) -> Iterator[str]:
        if self.config.loss.adversarial is None:
            return
        if is_mel_model(self.shapes):
            yield (
                "loss.adversarial: must be null for a model of mel spectrograms, whose output is no "
                "waveform, got a discriminator of waveforms. Remove it."
            )
            return
        clip = self.blank_clip(plan.phases[0].buckets[0])["audio"].unsqueeze(0)
        module = AudioVAE(on_meta(self.shapes))
        yield from adversary_problems(self.config, self.config.loss, plan, module=module, clip=clip)

    def _form_problems(self) -> Iterator[str]:
        takes, data = audio_facts(self.shapes, hop=self.config.model.temporal_stride), self.config.data
        rate_hz, channels = takes.sample_rate_hz, takes.channels
        if rate_hz not in {None, data.sample_rate_hz}:
            yield (
                f"data.sample_rate_hz: must be the model's, {rate_hz}, got {data.sample_rate_hz}. Set it; "
                "files are resampled."
            )
        if channels not in {None, data.channels}:
            yield (
                f"data.channels: must be the model's, {channels}, got {data.channels}. Set it; files are "
                "converted."
            )

    def blank_clip(self, bucket: BucketPlan) -> dict[str, Tensor]:
        """Returns `audio` [C,N]."""
        return {"audio": torch.empty(self.config.data.channels, bucket.frames, device="meta")}

    def _open_datasets(self, dataset: Any, validation: Any) -> ClipData:
        return open_audio_datasets(
            dataset,
            validation,
            self.config.data,
            seed=self.config.seed,
            value_range=self.value_range,
            held_out=self._what_is_held_out(),
        )

    def _open_files(self) -> ClipData:
        return open_audio_files(found_data(self.config.data, self.source), seed=self.config.seed)

    def build_unit(
        self,
        config: AudioVAETrainerConfig,
        *,
        model: nn.Module,
        plan: RunPlan,
        data: ClipData,
        too_short: tuple[TooShort, ...],
    ) -> AudioVAEUnit:
        """Returns `build_audio_vae_unit` with the model's strides."""
        return build_audio_vae_unit(
            config, model=model, plan=plan, data=data, too_short=too_short, strides=self.strides
        )


def build_audio_vae_unit(
    config: AudioVAETrainerConfig,
    *,
    model: nn.Module,
    plan: RunPlan,
    data: ClipData,
    too_short: tuple[TooShort, ...],
    strides: ModelStrides,
) -> AudioVAEUnit:
    """Returns what the loop trains; arguments as `Trainer.build_unit` says, and the model's strides."""
    return AudioVAEUnit(
        config=config,
        plan=plan,
        data=data,
        too_short=too_short,
        snapped=snap_notes(plan, strides),
        module=wrap_audio_vae(model),
    )


@dataclass(slots=True, kw_only=True)
class AudioVAEUnit(ClipUnit):
    """What the loop trains; a `Unit`."""

    config: AudioVAETrainerConfig
    module: AudioVAE | MelVAE
    _objective: Objective = field(init=False)
    _noise: PosteriorNoise = field(init=False)
    _parts: TrainedParts = field(init=False)
    _adversary: Adversary | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Builds the losses of all phases."""
        rate_hz = self.config.data.sample_rate_hz
        is_asked_for = self.config.evaluation.measures.visqol
        first = next(self.module.parameters())
        is_blank = first.is_meta
        self._objective = choose_objective(
            self.module,
            self.config.loss,
            self.plan,
            sample_rate_hz=rate_hz,
            opinion=Visqol(sample_rate_hz=rate_hz) if is_asked_for and not is_blank else None,
        )

        self._noise = PosteriorNoise(
            self.module,
            name="audio",
            shapes=[
                (self.config.data.channels, bucket.frames)
                for phase in self.plan.phases
                for bucket in phase.buckets
            ],
            dtype=self._objective.input_dtype(first.dtype),
            seed=self.config.seed,
        )

        self._parts = TrainedParts(
            self.module, self.plan, self._blank_clip(self._objective.input_dtype(first.dtype))
        )

    def prepare(self, phase: PhasePlan) -> None:
        """Marks what `phase` trains."""
        self._parts.prepare(phase)

    def hand_off(self, engine: Engine) -> WeightHandoff:
        """Returns the masters of what is trained. Collective."""
        return self._parts.hand_off(engine)

    def take_over(self, handoff: WeightHandoff) -> Iterable[tuple[str, Tensor]]:
        """Yields what was carried. Collective."""
        return handoff.whole()

    def probe(self, engine: Engine) -> Tensor:
        """Returns latents and output of the first held-out clip that can be read, in one vector."""
        clip = self.data.readable_clip(self.plan.phases[-1].buckets[0])["audio"][None]
        return answer(engine, clip.to(self._objective.input_dtype(engine.compute_dtype)))

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> Mapping[str, Tensor]:
        """Returns the posterior's noise, where the decoder gets draws; see `PosteriorNoise.draws`."""
        if self._parts.takes_mode(self.plan.phases[places[0][0]]):
            return {}
        return self._noise.draws(tensors, places)

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Reconstructs one micro-batch; the noise of each clip depends on its place in the global order, not
        on its rank."""
        wave_BCN = batch.tensors["audio"].to(engine.device, non_blocking=True)
        takes_mode = self._parts.takes_mode(phase)
        noise = None if takes_mode else self._noise.of(batch, phase.index, engine.device)
        weights = self._parts.weights(phase, batch.position)
        own_BCN = wave_BCN.to(self._objective.input_dtype(engine.compute_dtype))
        if self._adversary is not None and self._adversary.is_on:

            def loss_of(output: Tensor, mean: Tensor, logvar: Tensor | None) -> LossTerms:
                return self._objective.loss(phase, output, wave_BCN, mean, logvar, weights=weights)

            return self._adversary.loss(engine, (own_BCN, noise), wave_BCN, loss_of, phase)
        output, mean, logvar = engine(own_BCN, noise)
        target = self._objective.target(wave_BCN)
        return self._objective.loss(phase, output, target, mean, logvar, weights=weights)

    def open_companion(self, settings: DeepSpeedSettings) -> Companion | None:
        """Returns the discriminator, if the loss has one."""
        adversarial, channels = self.config.loss.adversarial, self.config.data.channels
        if adversarial is None:
            return None
        clip = self._blank_clip(next(self.module.parameters()).dtype)
        self._adversary = open_adversary(
            self.config,
            adversarial,
            settings,
            plan=self.plan,
            build=partial(audio_discriminators, adversarial, channels=channels),
            last_layer=choose_last_layer(self.module, clip, adversarial),
        )
        return self._adversary

    def evaluate(self, engine: Engine, request: EvaluationRequest) -> Evaluation:
        """Measures held-out clips in the last phase's shape, spread over ranks, with the posterior's mode."""
        quality = self._objective.new_quality()
        names, shown = self._measured_names(), dict[int, tuple[Tensor, Tensor]]()
        unread: dict[int, str] = {}
        for clip in self._held_out(engine, unread, request.go_on):
            original, output = self._objective.target(clip.original).cpu(), clip.output.cpu()
            quality.update(original, output, names=[names[clip.place]])
            if clip.place < self.config.evaluation.num_pictures:
                shown[clip.place] = (original, output)
        clips, unreadable = without_unread(names, unread)
        metrics, left_out = judged(engine, quality, self._objective.new_quality(), clips=clips)
        pairs = gather_shown(shown)
        examples = None
        if pairs and engine.rank == 0:
            originals, outputs = zip(*pairs, strict=True)
            examples = self._objective.examples(originals, outputs, sources=clips)
        return Evaluation(
            metrics=metrics,
            headline=self._objective.headline(metrics, clips, left_out) if clips else NOTHING_READ,
            examples=examples,
            clips=clips,
            not_judged=(*left_out, *unreadable, *self._passed_over()),
        )

    def export(self, engine: Engine, folder: Path) -> None:
        """Writes the trained model for `from_pretrained`, and the statistics of its latents on the held-out
        clips."""
        clips, originals = self._held_out(engine, {}), self._parts.originals()
        export_vae(engine, self.module.vae, clips, folder, originals=originals)

    def _blank_clip(self, dtype: torch.dtype) -> Tensor:
        """Returns a batch of one of the first phase, without values."""
        shape = (1, self.config.data.channels, self.plan.phases[0].buckets[0].frames)
        return torch.empty(shape, device="meta", dtype=dtype)

    def _held_out(
        self, engine: Engine, unread: dict[int, str], go_on: Callable[[], None] = lambda: None
    ) -> Iterator[HeldOutClip]:
        bucket, limit = self.plan.phases[-1].buckets[0], self.config.evaluation.max_clips
        dtype = self._objective.input_dtype(engine.compute_dtype)
        return held_out_clips(
            engine,
            self.data,
            bucket,
            name="audio",
            dtype=dtype,
            max_clips=limit,
            unread=unread,
            go_on=go_on,
        )
