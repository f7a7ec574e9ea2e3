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
    """Where clips come from. `train` and `validation` are a folder or a CSV, JSON or JSONL manifest.

    Without `validation`, `holdout_fraction` of the clips (at least one) is held out, chosen by the seed.
    """

    train: str = Field(min_length=1)
    validation: str | None = None
    holdout_fraction: Fraction = 0.1
    num_workers: NonNegativeInt = 2
    random_flip: bool = True
    max_unreadable_fraction: Fraction = 0.05

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
    weights: str | None = None
    fallback: Literal["error", "l2"] = "error"
    frames_per_clip: NonNegativeInt = 0


class VideoVAELossConfig(StrictModel):
    """Weights of the terms; a term with weight 0 is measured, not trained."""

    reconstruction: Literal["l1", "mse"] = "l1"
    perceptual_weight: NonNegativeFloat = 1.0
    kl_weight: NonNegativeFloat = 1e-6
    kl_reduction: Literal["per_input_element", "mean"] = "per_input_element"
    haar_weight: NonNegativeFloat = 0.0
    perceptual: PerceptualConfig = PerceptualConfig()

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name: every `*_weight`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}


class VAETrainerConfig(StrictModel):
    """Everything a VAE training run needs; see docs/configuration.md for each key."""

    trainer: Literal["video_vae"] = "video_vae"
    output_dir: str = Field(min_length=1)
    seed: NonNegativeInt = 0
    model: ModelConfig
    data: VideoDataConfig
    curriculum: CurriculumConfig
    loss: VideoVAELossConfig = VideoVAELossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()

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
