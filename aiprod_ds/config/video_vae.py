"""The configuration of the video VAE trainer: its data and its losses beside the shared sections of `run`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from typing_extensions import Self

from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.config.losses import LossConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.config.schema import NonNegativeFloat, NonNegativeInt, StrictModel


class VideoDataConfig(ClipDataConfig):
    """Where clips come from."""

    random_flip: bool = True
    """Mirrors half of the training clips from left to right. Held-out clips are never mirrored."""


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


class VideoVAELossConfig(LossConfig):
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


class VAETrainerConfig(RunConfig):
    """Everything that the training of a video VAE needs."""

    trainer: Literal["video_vae"] = "video_vae"
    """What is trained."""
    data: VideoDataConfig
    """The clips."""
    loss: VideoVAELossConfig = VideoVAELossConfig()
    """What is minimised."""

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
