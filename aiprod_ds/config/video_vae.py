"""The configuration of the video VAE trainer: its data and its losses beside the shared sections of `run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.config.losses import VideoVAELossConfig
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.run import EvaluationConfig, RunConfig, TrainerPath
from aiprod_ds.config.schema import CodePath, PositiveInt, StrictModel


class FvdConfig(StrictModel):
    """Fréchet distance of the features of a video network, of originals and reconstructions (rFVD)."""

    network: CodePath = Field(min_length=1)
    """A TorchScript file (`i3d_torchscript.pt` gives published FVD), one of a hub repository
    (`owner/name/file.pt`), or the import path of what makes a network (`my_package.module:make`)."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Of the TorchScript file, which is checked before it is read. null: that of `i3d_torchscript.pt`. No
    effect on an import path, so refused there."""
    size: PositiveInt = 224
    """Height and width of the frames that the network sees: the shorter side is scaled to it, the middle
    cut out."""

    @rule
    def _hash_has_effect(self) -> Iterator[str]:
        if self.sha256 is not None and ":" in self.network:
            yield f"sha256: has no effect on an import path, got {self.network!r}. Remove it."


class VideoMeasuresConfig(StrictModel):
    """Measures beside PSNR, SSIM and flicker."""

    lpips: Literal["auto", "on", "off"] = "auto"
    """LPIPS of every frame, with VGG16. `auto`: where the loss has loaded that network anyway. `on`: always;
    the weights are those of `loss.perceptual.weights` or lie in the torch hub cache."""
    fvd: FvdConfig | None = None
    """rFVD. Of few clips it is biased upwards: hold out at least twice as many as the network has
    features. null: not measured."""


class VideoEvaluationConfig(EvaluationConfig):
    """How held-out clips are measured: always in the shape of the last phase, so that figures compare across
    phases."""

    measures: VideoMeasuresConfig = VideoMeasuresConfig()
    """What is measured beside PSNR, SSIM and flicker."""


class VAETrainerConfig(RunConfig):
    """Everything that the training of a video VAE needs."""

    has_stages: ClassVar[bool] = True

    trainer: Literal["video_vae"] | TrainerPath = "video_vae"
    """What is trained: by this name, or by the import path of a class derived from its trainer
    (`my_package.module:MyTrainer`)."""
    data: VideoDataConfig
    """The clips."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """The phases. Without it: those of `preset: default`."""
    loss: VideoVAELossConfig = VideoVAELossConfig()
    """What is minimised."""
    evaluation: VideoEvaluationConfig = VideoEvaluationConfig()
    """What is measured on held-out clips."""

    @rule
    def _phases_have_a_resolution(self) -> Iterator[str]:
        for where, shape in self.phase_shapes():
            if shape.resolution is None:
                yield f"{where}.resolution: must be given for video, got nothing. Add `resolution:`."

    def loss_weights(self) -> dict[str, float]:
        """Returns every `*_weight` of the loss section."""
        return self.loss.weights()

    def random_flip(self) -> bool:
        """Returns `data.random_flip`."""
        return self.data.random_flip

    def clip_rate_hz(self) -> float | None:
        """Returns None: every clip has a frame rate of its own."""
        return None
