"""The video VAE trainer: what is trained, its loss and its held-out measures. The loop is
`aiprod_ds.train.loop`.

Shape suffixes: B batch, C channels, T frames, H height, W width; N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.load import found_data
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.plan import snap_notes
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.losses import LossTerms, PerceptualLoss, VideoVAELoss
from aiprod_ds.metrics.video_features import load_features
from aiprod_ds.models.discriminators.judgement import video_discriminators
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.models.video_vae import VideoVAE, video_strides
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.unit import Companion, Evaluation, EvaluationRequest
from aiprod_ds.trainers.adversarial.adversary import Adversary
from aiprod_ds.trainers.adversarial.opening import adversary_problems, choose_last_layer, open_adversary
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.clip_unit import ClipUnit
from aiprod_ds.trainers.evaluation import (
    NOTHING_READ,
    HeldOutClip,
    gather_shown,
    held_out_clips,
    measured_names,
    without_unread,
)
from aiprod_ds.trainers.measures import (
    VideoMeasures,
    judged,
    video_measure_names,
    video_measure_problems,
    video_measures,
)
from aiprod_ds.trainers.open_data import open_video_datasets, open_video_files
from aiprod_ds.trainers.posterior_noise import PosteriorNoise
from aiprod_ds.trainers.stages.parts import TrainedParts, answer
from aiprod_ds.trainers.stages.rules import stage_problems
from aiprod_ds.trainers.vae_export import export_vae
from aiprod_ds.trainers.video_examples import VideoExamples, shown_pair


class VideoVAETrainer(Trainer[VAETrainerConfig]):
    """Trains a video VAE through a curriculum.

    A model that is passed in must offer what `VideoVAE` says; items of a dataset are what `VideoItems` reads:
    clips [3, T, H, W], floating in `value_range` or uint8, or dicts with 'video' and optionally 'fps'. The
    arguments are those of `Trainer`.
    """

    config_class: ClassVar[type[RunConfig]] = VAETrainerConfig

    @cached_property
    def strides(self) -> ModelStrides:
        """How the model divides height, width and frames; found on the meta device."""
        return video_strides(self.shapes, self.config.model)

    def plan(self, *, world_size: int = 1) -> RunPlan:
        """Returns the curriculum as it would run on `world_size` ranks; takes no memory for weights of the
        model.

        Raises:
            PlanError: With every problem found, also of what the measures, the stages and the discriminator
                need.
        """
        plan = super().plan(world_size=world_size)
        problems = list(video_measure_problems(self.config, plan))
        module = VideoVAE(on_meta(self.shapes))
        clip = self.blank_clip(plan.phases[0].buckets[0])["video"].unsqueeze(0)
        clip = clip.to(next(module.parameters()).dtype)
        problems += stage_problems(self.config.loss, plan, module=module, clip=clip)
        if self.config.loss.adversarial is not None:
            problems += adversary_problems(self.config, self.config.loss, plan, module=module, clip=clip)
        if problems:
            raise PlanError([f"{self.source}: {problem}" for problem in problems])
        return plan

    def measures(self, plan: RunPlan) -> tuple[str, ...]:
        """Returns `video_measure_names`."""
        return video_measure_names(self.config, plan)

    def measure_notes(self, plan: RunPlan, data: ClipData) -> tuple[str, ...]:
        """Returns that rFVD is biased, if it is measured on too few clips."""
        evaluation, bucket = self.config.evaluation, plan.phases[-1].buckets[0]
        if evaluation.measures.fvd is None:
            return ()
        features = load_features(evaluation.measures.fvd, num_frames=bucket.frames)
        names = measured_names(data, bucket, max_clips=evaluation.max_clips)
        return VideoMeasures(features=features).notes(len(names))

    def blank_clip(self, bucket: BucketPlan) -> dict[str, Tensor]:
        """Returns `video` [3,T,H,W]."""
        return {"video": torch.empty(3, bucket.frames, bucket.height, bucket.width, device="meta")}

    def _open_datasets(self, dataset: Any, validation: Any) -> ClipData:
        return open_video_datasets(
            dataset,
            validation,
            seed=self.config.seed,
            value_range=self.value_range,
            held_out=self._what_is_held_out(),
        )

    def _open_files(self) -> ClipData:
        return open_video_files(found_data(self.config.data, self.source), seed=self.config.seed)

    def build_unit(
        self,
        config: VAETrainerConfig,
        *,
        model: nn.Module,
        plan: RunPlan,
        data: ClipData,
        too_short: tuple[TooShort, ...],
    ) -> VideoVAEUnit:
        """Returns `build_video_vae_unit` with the model's strides."""
        return build_video_vae_unit(
            config, model=model, plan=plan, data=data, too_short=too_short, strides=self.strides
        )


def build_video_vae_unit(
    config: VAETrainerConfig,
    *,
    model: nn.Module,
    plan: RunPlan,
    data: ClipData,
    too_short: tuple[TooShort, ...],
    strides: ModelStrides,
) -> VideoVAEUnit:
    """Returns what the loop trains; arguments as `Trainer.build_unit` says, and the model's strides."""
    return VideoVAEUnit(
        config=config,
        plan=plan,
        data=data,
        too_short=too_short,
        snapped=snap_notes(plan, strides),
        module=VideoVAE(model),
    )


@dataclass(slots=True, kw_only=True)
class VideoVAEUnit(ClipUnit):
    """What the loop trains; a `Unit`."""

    config: VAETrainerConfig
    module: VideoVAE
    _perceptual: PerceptualLoss | None = field(init=False, default=None)
    _losses: dict[int, VideoVAELoss] = field(init=False)
    _noise: PosteriorNoise = field(init=False)
    _parts: TrainedParts = field(init=False)
    _measures: VideoMeasures = field(init=False, default_factory=VideoMeasures)
    _adversary: Adversary | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Builds the losses of all phases and the measures, so that a missing weight file is found before
        training."""
        first = next(self.module.parameters())
        is_blank = first.is_meta
        buckets = [bucket for phase in self.plan.phases for bucket in phase.buckets]
        self._noise = PosteriorNoise(
            self.module,
            name="video",
            shapes=[(3, bucket.frames, bucket.height, bucket.width) for bucket in buckets],
            dtype=first.dtype,
            seed=self.config.seed,
        )
        self._parts = TrainedParts(self.module, self.plan, self._blank_clip())
        if any(phase.loss_weights["perceptual_weight"] > 0 for phase in self.plan.phases):
            try:
                self._perceptual = PerceptualLoss(self.config.loss.perceptual, is_blank=is_blank)
            except DataError as error:
                raise PlanError(f"loss.perceptual: {error}") from error
        self._losses = {
            phase.index: VideoVAELoss(
                self.config.loss.model_copy(update=dict(phase.loss_weights)), self._perceptual
            )
            for phase in self.plan.phases
        }
        if not is_blank:
            num_clips = len(self._measured_names())
            self._measures = video_measures(self.config, self.plan, self._perceptual, num_clips=num_clips)

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
        """Returns latents and reconstruction of the first held-out clip that can be read, in one vector."""
        clip = self.data.readable_clip(self.plan.phases[-1].buckets[0])["video"][None]
        return answer(engine, clip.to(engine.compute_dtype))

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Reconstructs one micro-batch; the noise of each clip depends on its place in the global order, not
        on its rank."""
        video = batch.tensors["video"]
        video_BCTHW = video.to(engine.device, engine.compute_dtype, non_blocking=True)
        place = [(phase.index, batch.position, sample.ordinal) for sample in batch.samples]
        takes_mode = self._parts.takes_mode(phase)
        noise = None if takes_mode else self._noise.of(batch, phase.index, engine.device)
        weights = self._parts.weights(phase, batch.position)
        frames = [stream_seed(self.config.seed, "perceptual_frames", *numbers) for numbers in place]

        def loss_of(reconstruction_BCTHW: Tensor, mean: Tensor, logvar: Tensor | None) -> LossTerms:
            terms: LossTerms = self._losses[phase.index](
                reconstruction_BCTHW, target_BCTHW, mean, logvar, frame_seeds=frames, weights=weights
            )
            return terms

        if self._adversary is not None and self._adversary.is_on:
            target_BCTHW = video.to(engine.device, non_blocking=True)
            return self._adversary.loss(engine, (video_BCTHW, noise), target_BCTHW, loss_of, phase)
        reconstruction_BCTHW, mean, logvar = engine(video_BCTHW, noise)
        target_BCTHW = video.to(engine.device, non_blocking=True)
        return loss_of(reconstruction_BCTHW, mean, logvar)

    def open_companion(self, settings: DeepSpeedSettings) -> Companion | None:
        """Returns the discriminator, if the loss has one."""
        adversarial = self.config.loss.adversarial
        if adversarial is None:
            return None
        clip = self._blank_clip()
        self._adversary = open_adversary(
            self.config,
            adversarial,
            settings,
            plan=self.plan,
            build=partial(video_discriminators, adversarial),
            last_layer=choose_last_layer(self.module, clip, adversarial),
        )
        return self._adversary

    def draws(self, tensors: Mapping[str, Tensor], places: Sequence[tuple[int, ...]]) -> Mapping[str, Tensor]:
        """Returns the posterior's noise, where the decoder gets draws; see `PosteriorNoise.draws`."""
        if self._parts.takes_mode(self.plan.phases[places[0][0]]):
            return {}
        return self._noise.draws(tensors, places)

    def evaluate(self, engine: Engine, request: EvaluationRequest) -> Evaluation:
        """Measures held-out clips in the last phase's shape, spread over ranks, with the posterior's mode."""
        quality, shown = self._measures.new_quality(), {}
        names, rates = self._measured_names(), self._frame_rates()
        unread: dict[int, str] = {}
        for clip in self._held_out(engine, unread, request.go_on):
            quality.update(clip.original, clip.output, names=[names[clip.place]])
            if clip.place < self.config.evaluation.num_pictures:
                rate_hz = rates[clip.place]
                shown[clip.place] = shown_pair(clip.original, clip.output, frame_rate_hz=rate_hz)
        clips, unreadable = without_unread(names, unread)
        metrics, left_out = judged(engine, quality, self._measures.new_quality(), clips=clips)
        pairs = gather_shown(shown)
        examples = VideoExamples(pairs=tuple(pairs), sources=clips) if pairs and engine.rank == 0 else None
        return Evaluation(
            metrics=metrics,
            headline=f"PSNR {metrics['psnr_db']:.1f} dB" if metrics else NOTHING_READ,
            examples=examples,
            clips=clips,
            not_judged=(*left_out, *unreadable, *self._passed_over()),
        )

    def export(self, engine: Engine, folder: Path) -> None:
        """Writes the trained model for `from_pretrained`, and the statistics of its latents on the held-out
        clips."""
        clips, originals = self._held_out(engine, {}), self._parts.originals()
        export_vae(engine, self.module.vae, clips, folder, originals=originals)

    def replacements(self) -> tuple[str, ...]:
        """Returns snapped frame counts, a replaced perceptual network, doubtful measures and clips that do
        not fit their bucket."""
        is_l2 = self._perceptual is not None and self._perceptual.active_mode == "l2"
        network = (
            ["perceptual/mode=l2: no VGG16 weights, mean squared error in place of the network"]
            if is_l2
            else []
        )
        doubts = self._measures.notes(len(self._measured_names()))
        return (*self.snapped, *network, *doubts, *self.data.replacements(self.plan))

    def _blank_clip(self) -> Tensor:
        """Returns a batch of one of the first phase, without values."""
        bucket = self.plan.phases[0].buckets[0]
        shape = (1, 3, bucket.frames, bucket.height, bucket.width)
        return torch.empty(shape, device="meta", dtype=next(self.module.parameters()).dtype)

    def _held_out(
        self, engine: Engine, unread: dict[int, str], go_on: Callable[[], None] = lambda: None
    ) -> Iterator[HeldOutClip]:
        bucket, limit = self.plan.phases[-1].buckets[0], self.config.evaluation.max_clips
        return held_out_clips(
            engine,
            self.data,
            bucket,
            name="video",
            dtype=engine.compute_dtype,
            max_clips=limit,
            unread=unread,
            go_on=go_on,
        )

    def _frame_rates(self) -> tuple[float, ...]:
        """Returns the rate at which each held-out clip is shown: the phase's, or the clip's own."""
        bucket = self.plan.phases[-1].buckets[0]
        clips = (self.data.validation_clips[index] for index in self.data.held_out(bucket))
        return tuple(bucket.frame_rate_hz or clip.frames / clip.seconds for clip in clips)
