"""The configuration of the diffusion trainer: latents, their VAEs, objective and mode, beside the shared
sections of `run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from aiprod_ds.config.data import LatentDataConfig
from aiprod_ds.config.losses import FlowConfig
from aiprod_ds.config.model import LoraConfig, LoraFileConfig, ModelConfig
from aiprod_ds.config.phase import PhaseConfig, TrainingMode
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.run import EvaluationConfig, RunConfig, TrainerPath
from aiprod_ds.config.sample import TrainingPreviewConfig

NoiseLevel = Annotated[float, Field(gt=0, le=1)]


class DiffusionModelConfig(ModelConfig):
    """Where the transformer comes from, and which LoRA it starts with."""

    lora_checkpoint: LoraFileConfig | None = None
    """A LoRA that is merged into the weights before training. null: none."""
    lora_init: LoraFileConfig | None = None
    """A LoRA that the adapters of the first phase go on from. null: they start with no effect."""


class DiffusionEvaluationConfig(EvaluationConfig):
    """How held-out clips are measured: the loss at fixed noise levels, with noise that is the same in every
    run."""

    noise_levels: tuple[NoiseLevel, ...] = Field(
        default=(0.125, 0.375, 0.625, 0.875), min_length=1, strict=False
    )
    """Levels in (0, 1] at which every held-out clip is measured, all modalities at the same level."""


class DiffusionTrainerConfig(RunConfig):
    """Everything that the training of a latent diffusion transformer needs.

    Pixels and frames of the phases are those of the clips before they were encoded.
    """

    has_adapters: ClassVar[bool] = True

    trainer: Literal["diffusion"] | TrainerPath = "diffusion"
    """What is trained: by this name, or by the import path of a class derived from its trainer
    (`my_package.module:MyTrainer`)."""
    model: DiffusionModelConfig
    """The transformer."""
    vae: ModelConfig
    """The video VAE of the latents; its weights are compared with those that encoded, and it decodes the
    previews."""
    audio_vae: ModelConfig | None = None
    """The audio VAE of the latents. Required by models of video and sound, and only by them."""
    training_mode: TrainingMode = "full"
    """`full` trains every weight of the model, `lora` only the adapters that `lora` describes. A phase may
    set its own; between two phases that differ, adapters are merged into the weights."""
    lora: LoraConfig | None = None
    """The adapters of phases that have no own. null: the defaults; not if no phase trains adapters."""
    data: LatentDataConfig
    """The latents."""
    loss: FlowConfig = FlowConfig()
    """What is minimised."""
    evaluation: DiffusionEvaluationConfig = DiffusionEvaluationConfig()
    """What is measured on held-out clips."""
    preview: TrainingPreviewConfig = TrainingPreviewConfig()
    """How, when and from what the clips are made that show the model."""

    def phase_adapters(self, phase: PhaseConfig) -> LoraConfig | None:
        """Returns the adapters that `phase` trains; None if it trains the weights themselves."""
        return adapters_of(phase, training_mode=self.training_mode, lora=self.lora)

    def loss_weights(self) -> dict[str, float]:
        """Returns every `*_weight` of the loss section."""
        return self.loss.weights()

    def has_previews(self) -> bool:
        """Returns whether evaluations sample clips."""
        preview = self.preview
        own = bool(preview.prompts) or preview.prompts_file is not None
        return own or self.evaluation.num_pictures > 0

    def preview_updates(self) -> int | None:
        """Returns the updates between two previews inside phases; None if there are none."""
        return self.preview.every_updates

    def random_flip(self) -> bool:
        """Returns False: latents are not mirrored."""
        return False

    def clip_rate_hz(self) -> float | None:
        """Returns None: every clip has its own rate unless a phase sets one."""
        return None

    @rule
    def _missing_keys(self) -> Iterator[str]:
        for where, shape in self.phase_shapes():
            if shape.resolution is None:
                yield f"{where}.resolution: must be given for video, got nothing. Add `resolution:`."

    @rule
    def _keys_without_effect(self) -> Iterator[str]:
        for name in ("spatial_stride", "temporal_stride"):
            value = getattr(self.model, name)
            if value is not None:
                yield (
                    f"model.{name}: has no effect for a transformer, got {value}. Set it in the section vae."
                )
        if self.preview.every_updates is not None and not self.has_previews():
            yield (
                "preview.every_updates: has no effect without previews, got a value. Add preview.prompts, "
                "raise evaluation.num_pictures or remove it."
            )
        for index, phase in enumerate(self.curriculum.phases):
            if phase.augment.random_flip is not None:
                yield (
                    f"curriculum.phases[{index}].augment.random_flip: has no effect for latents, got a "
                    "value. Remove it."
                )

    @rule
    def _adapters_without_effect(self) -> Iterator[str]:
        phases = self.curriculum.phases
        if (
            self.lora is not None
            and phases
            and all(self.phase_adapters(phase) != self.lora or phase.lora for phase in phases)
        ):
            yield (
                "lora: has no effect unless a phase trains these adapters, got a value. Remove it or set "
                "training_mode: lora."
            )
        if self.model.lora_init is not None and phases and self.phase_adapters(phases[0]) is None:
            yield (
                "model.lora_init: has no effect unless the first phase trains adapters, got a value. "
                "Set training_mode: lora, or merge it with model.lora_checkpoint."
            )
        previous = self.phase_adapters(phases[0]) if phases else None
        for index, phase in enumerate(phases):
            adapters = self.phase_adapters(phase)
            if phase.lora is not None and adapters is None:
                yield (
                    f"curriculum.phases[{index}].lora: has no effect with training_mode: full, got a value. "
                    "Remove it or set training_mode: lora."
                )
            if adapters != previous and phase.moments in {"keep", "decay"}:
                yield (
                    f"curriculum.phases[{index}].moments: must be reset where other parameters are trained, "
                    f"got {phase.moments}. "
                    "Remove it: a new optimizer begins with the phase."
                )
            previous = adapters


def adapters_of(
    phase: PhaseConfig, *, training_mode: TrainingMode, lora: LoraConfig | None
) -> LoraConfig | None:
    """Returns the adapters that `phase` trains, its own before those of the run; None if it trains the
    weights themselves.

    Args:
        phase: Of the curriculum.
        training_mode: Of phases that have no own.
        lora: Of phases that have no own.
    """
    if (phase.training_mode or training_mode) == "full":
        return None
    return phase.lora or lora or LoraConfig()
