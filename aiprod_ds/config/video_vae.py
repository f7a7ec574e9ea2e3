"""The configuration of the video VAE trainer: its data and its losses beside the shared sections of `run`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from aiprod_ds.config.data import VideoDataConfig
from aiprod_ds.config.losses import VideoVAELossConfig
from aiprod_ds.config.measures import VideoMeasuresConfig
from aiprod_ds.config.run import EvaluationConfig, RunConfig, TrainerPath


class VideoEvaluationConfig(EvaluationConfig):
    """How held-out clips are measured: always in the shape of the last phase, so that figures compare across
    phases."""

    measures: VideoMeasuresConfig = VideoMeasuresConfig()
    """What is measured beside PSNR, SSIM and flicker."""


class VAETrainerConfig(RunConfig):
    """Everything that the training of a video VAE needs."""

    trainer: Literal["video_vae"] | TrainerPath = "video_vae"
    """What is trained: by this name, or by the import path of a class derived from its trainer
    (`my_package.module:MyTrainer`)."""
    data: VideoDataConfig
    """The clips."""
    loss: VideoVAELossConfig = VideoVAELossConfig()
    """What is minimised."""
    evaluation: VideoEvaluationConfig = VideoEvaluationConfig()
    """What is measured on held-out clips."""

    @model_validator(mode="after")
    def _phases_have_a_resolution(self) -> Self:
        problems = [
            f"{where}.resolution: must be given for video, got nothing. Add `resolution:`."
            for where, shape in self.phase_shapes()
            if shape.resolution is None
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def loss_weights(self) -> dict[str, float]:
        """Returns every `*_weight` of the loss section."""
        return self.loss.weights()

    def random_flip(self) -> bool:
        """Returns `data.random_flip`."""
        return self.data.random_flip

    def clip_rate_hz(self) -> float | None:
        """Returns None: every clip has a frame rate of its own."""
        return None
