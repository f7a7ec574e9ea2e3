"""The configuration of the VAE trainers: data, losses and the shared sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.model import Fraction, NonNegativeFloat, NonNegativeInt, StrictModel
from aiprod_ds.config.nearest import suggestion
from aiprod_ds.config.run import CheckpointConfig, EngineConfig, EvaluationConfig, ModelConfig, OptimizerConfig, ReportConfig


class VideoDataConfig(StrictModel):
    """Where clips come from."""

    train: str = Field(min_length=1)
    """A folder, searched recursively, or a CSV, JSON or JSONL manifest; relative to the working folder."""
    validation: str | None = None
    """Held-out clips, in the same forms. null: `holdout_fraction` of the training clips."""
    holdout_fraction: Fraction = 0.1
    """Share of the clips that is held out, at least one; chosen by the seed and the files' content. Not beside `validation`."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that decode ahead; 0 decodes in the training process. No effect on the result."""
    random_flip: bool = True
    """Mirrors half of the training clips from left to right. Held-out clips are never mirrored."""
    max_unreadable_fraction: Fraction = 0.05
    """Share of files that may be unreadable; above it the run stops before training."""

    @model_validator(mode="after")
    def _holdout_has_effect(self) -> Self:
        # The default value is no choice, so that a resolved configuration, which states every default, loads again.
        if self.validation is not None and self.holdout_fraction != type(self).model_fields["holdout_fraction"].default:
            raise ValueError(
                f"holdout_fraction: has no effect when validation is set, got {self.holdout_fraction}. Remove one of the two."
            )
        return self


class PerceptualConfig(StrictModel):
    """VGG16 feature distance; see `aiprod_ds.losses.perceptual.PerceptualLoss`."""

    mode: Literal["lpips", "vgg"] = "lpips"
    """`lpips`: unit-normalised features with learned heads; `vgg`: plain feature distance."""
    weights: str | None = None
    """A local copy of torchvision's VGG16 file; its hash is checked. null: the torch hub cache, else a download."""
    fallback: Literal["error", "l2"] = "error"
    """What happens when there are no weights: `l2` takes the mean squared error in their place, and the report says so."""
    frames_per_clip: NonNegativeInt = 0
    """Frames of each clip that the network looks at, chosen at random; 0 takes all."""


class VideoVAELossConfig(StrictModel):
    """The terms of the loss and their weights; a term of weight 0 is measured where it can be, not trained."""

    reconstruction: Literal["l1", "mse"] = "l1"
    """Mean absolute or mean squared error; its weight is 1."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of the VGG16 distance. 0 in every phase: the network is not loaded and the term not measured."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the posterior's divergence from the unit normal."""
    kl_reduction: Literal["per_input_element", "mean"] = "per_input_element"
    """The sum over a clip's latents divided by its input elements, or the mean over latents."""
    haar_weight: NonNegativeFloat = 0.0
    """Weight of the L1 distance between one-level 3-D Haar sub-bands."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """The network behind `perceptual_weight`."""

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name: every `*_weight`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}


class VAETrainerConfig(StrictModel):
    """Everything that the training of a VAE needs."""

    trainer: Literal["video_vae"] = "video_vae"
    """What is trained."""
    output_dir: str = Field(min_length=1)
    """The run folder, relative to the working folder; `--output-dir` replaces it."""
    seed: NonNegativeInt = 0
    """Of every random stream: weights, data order, clips, noise."""
    model: ModelConfig
    """The network."""
    data: VideoDataConfig
    """The clips."""
    curriculum: CurriculumConfig
    """The phases."""
    loss: VideoVAELossConfig = VideoVAELossConfig()
    """What is minimised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it is minimised."""
    engine: EngineConfig = EngineConfig()
    """What it runs on: ZeRO stage, precision, offload."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on held-out clips."""
    report: ReportConfig = ReportConfig()
    """Where metrics go."""

    @model_validator(mode="after")
    def _phases_weigh_known_terms(self) -> Self:
        known = self.loss.weights()
        problems = [
            f"curriculum.phases[{index}].loss.{name}: is not a weight of the loss section, got {value}. {suggestion(name, known)}"
            for index, phase in enumerate(self.curriculum.phases)
            for name, value in phase.loss.items()
            if name not in known
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self
