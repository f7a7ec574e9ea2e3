"""The video VAE trainer: what is trained, its loss and its held-out measures. The loop is `aiprod_ds.train.loop`.

Shape suffixes: B batch, C channels, T frames, H height, W width; N clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.curriculum.plan import ModelStrides, plan_run
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine, ParameterGroup
from aiprod_ds.errors import ConfigError, DataError, PlanError
from aiprod_ds.losses import LossTerms, PerceptualLoss, VideoVAELoss
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import VideoVAE, video_strides
from aiprod_ds.report.quality import VideoQuality
from aiprod_ds.report.summary import DataSummary, RunSummary
from aiprod_ds.rng import stream_seed
from aiprod_ds.train.run import evaluate_checkpoint, run_training
from aiprod_ds.train.unit import Evaluation
from aiprod_ds.train.video_data import ClipStream, VideoData, open_datasets, open_files

_SHOWN_FRAMES = 3


class VideoVAETrainer:
    """Trains a video VAE through a curriculum.

    Args:
        config: The whole configuration.
        model: A VAE to train in place of `config.model` (see `VideoVAE` for what it must offer).
        dataset: Training clips in place of `config.data.train`: map-style, items [3, T, H, W] in [-1, 1] or dicts with 'video'.
        validation: Held-out clips, in the same form; required with `dataset`.
        source: How messages name the configuration.

    Raises:
        ConfigError: If `dataset` comes without `validation`.
    """

    def __init__(
        self,
        config: VAETrainerConfig,
        *,
        model: nn.Module | None = None,
        dataset: Any = None,
        validation: Any = None,
        source: str = "configuration",
    ) -> None:
        if (dataset is None) != (validation is None):
            raise ConfigError("VideoVAETrainer: dataset and validation go together, got one of them. Pass both or neither.")
        self.config = config
        self.source = source
        self._model = model
        self._datasets = (dataset, validation)

    @cached_property
    def strides(self) -> ModelStrides:
        """How the model divides height, width and frames; found on the meta device."""
        return video_strides(self._shapes, self.config.model)

    def plan(self, *, world_size: int = 1) -> RunPlan:
        """Returns the curriculum as it would run on `world_size` ranks; takes no memory for weights.

        Raises:
            PlanError: With every problem found.
        """
        return plan_run(self.config, world_size=world_size, strides=self.strides, source=self.source)

    def num_parameters(self) -> int:
        """Returns the number of parameters of the model."""
        return sum(parameter.numel() for parameter in self._shapes.parameters())

    def open_data(self) -> VideoData:
        """Reads the manifests on the main rank and gives every rank the same clips."""
        try:
            if self._datasets[0] is not None:
                return open_datasets(*self._datasets, seed=self.config.seed)
            return dist.from_main(lambda: open_files(self.config.data, seed=self.config.seed))
        except DataError as error:  # before training it is the configuration's data section that must change
            raise PlanError(f"{self.source}: data: {error}") from error

    def train(self, *, resume: str = "auto", console: Console | None = None) -> RunSummary:
        """Runs the whole training, or what is left of it.

        Args:
            resume: `auto` goes on from the newest checkpoint in `output_dir`; `never` starts anew and moves an old run aside; a
                path names a checkpoint folder.
            console: Where progress is drawn; standard error by default. Log through the same one, or lines tear the display.

        Returns:
            What the report says; files are in `config.output_dir`.
        """
        plan, unit = self._prepare()
        return run_training(self.config, unit, plan, resume=resume, source=self.source, console=console)

    def evaluate(self, *, resume: str = "auto") -> dict[str, float]:
        """Returns the held-out measures of a checkpoint: the newest in `output_dir`, or the folder that `resume` names.

        Raises:
            CheckpointError: If there is none.
        """
        plan, unit = self._prepare()
        return evaluate_checkpoint(self.config, unit, plan, resume=resume, source=self.source)

    @cached_property
    def _shapes(self) -> nn.Module:
        if self._model is not None:
            return self._model
        return build_model(self.config.model, seed=self.config.seed, device="meta")

    def _prepare(self) -> tuple[RunPlan, VideoVAEUnit]:
        plan = self.plan(world_size=dist.world_size())
        data = self.open_data()
        too_short = data.check(plan, self.source)
        plan = data.with_lengths(plan, self.source)
        model = self._model if self._model is not None else build_model(self.config.model, seed=self.config.seed)
        unit = VideoVAEUnit(config=self.config, plan=plan, data=data, too_short=too_short, module=VideoVAE(model))
        return plan, unit


@dataclass(slots=True, kw_only=True)
class VideoVAEUnit:
    """What the loop trains; a `Unit`."""

    config: VAETrainerConfig
    plan: RunPlan
    data: VideoData
    too_short: tuple[TooShort, ...]
    module: nn.Module
    _perceptual: PerceptualLoss | None = field(init=False, default=None)
    _losses: dict[int, VideoVAELoss] = field(init=False)

    def __post_init__(self) -> None:
        """Builds the losses of all phases, so that a missing weight file is found before training."""
        if any(phase.loss_weights["perceptual_weight"] > 0 for phase in self.plan.phases):
            try:
                self._perceptual = PerceptualLoss(self.config.loss.perceptual)
            except DataError as error:
                raise PlanError(f"loss.perceptual: {error}") from error
        self._losses = {
            phase.index: VideoVAELoss(self.config.loss.model_copy(update=dict(phase.loss_weights)), self._perceptual)
            for phase in self.plan.phases
        }

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Returns matrices and kernels, which are decayed, and vectors and scalars, which are not."""
        trained = [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        decayed = tuple(name for name, parameter in trained if parameter.dim() > 1)
        plain = tuple(name for name, parameter in trained if parameter.dim() <= 1)
        groups = (
            ParameterGroup(names=decayed, is_decayed=True),
            ParameterGroup(names=plain, is_decayed=False),
        )
        return [group for group in groups if group.names]

    def open_stream(self, phase: PhasePlan, clock: Clock, *, rank: int, world_size: int) -> ClipStream:
        """Returns the data of `phase` from where `clock` stands."""
        workers = self.config.data.num_workers
        return self.data.stream(phase, clock, rank=rank, world_size=world_size, seed=self.config.seed, num_workers=workers)

    def loss(self, engine: Engine, batch: MicroBatch, phase: PhasePlan) -> LossTerms:
        """Reconstructs one micro-batch; the noise of each clip depends on its place in the global order, not on its rank."""
        video_BCTHW = batch.video.to(engine.device, engine.compute_dtype, non_blocking=True)
        place = [(phase.index, batch.position, sample.ordinal) for sample in batch.samples]
        noise = [stream_seed(self.config.seed, "posterior", *numbers) for numbers in place]
        frames = [stream_seed(self.config.seed, "perceptual_frames", *numbers) for numbers in place]
        reconstruction_BCTHW, mean, logvar = engine(video_BCTHW, noise)
        _require_posterior(logvar, phase)
        target_BCTHW = batch.video.to(engine.device, non_blocking=True)
        terms: LossTerms = self._losses[phase.index](reconstruction_BCTHW, target_BCTHW, mean, logvar, frame_seeds=frames)
        return terms

    @torch.no_grad()
    def evaluate(self, engine: Engine) -> Evaluation:
        """Measures held-out clips in the last phase's shape, spread over ranks, with the posterior's mode."""
        bucket = self.plan.phases[-1].buckets[0]
        clips = self.data.held_out(bucket)[: self.config.evaluation.max_clips]
        quality, shown = VideoQuality(), {}
        for turn in range(-(-len(clips) // engine.world_size)):  # as many forwards on every rank: ZeRO-3 gathers in each
            place = turn * engine.world_size + engine.rank
            original_BCTHW = self.data.held_out_clip(clips[min(place, len(clips) - 1)], bucket)[None]
            output_BCTHW = engine(original_BCTHW.to(engine.device, engine.compute_dtype))[0].float().cpu()
            if place < len(clips):
                quality.update(original_BCTHW, output_BCTHW)
            if place < min(len(clips), self.config.evaluation.num_pictures):
                shown[place] = (_some_frames(original_BCTHW), _some_frames(output_BCTHW))
        together = VideoQuality()
        together.merge(dist.reduce_mean(quality.state().to(engine.device)).cpu() * engine.world_size)
        pairs = dict(sorted(item for part in dist.gather_objects(shown) for item in part.items()))
        is_shown = bool(pairs) and engine.rank == 0
        return Evaluation(
            metrics=together.compute(),
            original=torch.cat([pair[0] for pair in pairs.values()]) if is_shown else None,
            reconstruction=torch.cat([pair[1] for pair in pairs.values()]) if is_shown else None,
        )

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Writes the trained model for `from_pretrained`: config.json (models of diffusers) and safetensors."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        vae: Any = self.module.vae
        if hasattr(vae, "save_config"):
            vae.save_config(folder)
        tensors = {name.removeprefix("vae."): tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

    def data_summary(self) -> DataSummary:
        """Returns what the run trains on and what it could not use."""
        return self.data.summary(self.too_short)

    def replacements(self) -> tuple[str, ...]:
        """Returns snapped frame counts, a replaced perceptual network and clips that do not fit their bucket."""
        snapped = [
            f"phase {phase.name}: frames {bucket.requested_frames} -> {bucket.frames} (the model takes 1 + stride * k frames)"
            for phase in self.plan.phases
            for bucket in phase.buckets
            if bucket.frames != bucket.requested_frames
        ]
        is_l2 = self._perceptual is not None and self._perceptual.active_mode == "l2"
        network = ["perceptual/mode=l2: no VGG16 weights, mean squared error in place of the network"] if is_l2 else []
        return (*snapped, *network, *self.data.replacements(self.plan))


def _require_posterior(logvar: Tensor | None, phase: PhasePlan) -> None:
    if logvar is None:
        raise ConfigError(
            f"loss.kl_weight: needs a model with a posterior, got a deterministic autoencoder in phase {phase.name}. "
            "Use a model whose encode returns a distribution."
        )


def _some_frames(video_BCTHW: Tensor) -> Tensor:
    frames = torch.linspace(0, video_BCTHW.shape[2] - 1, min(_SHOWN_FRAMES, video_BCTHW.shape[2])).round().long()
    return video_BCTHW[:, :, frames]
