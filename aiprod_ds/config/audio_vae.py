"""The configuration of the audio VAE trainer: its data and its losses beside the shared sections of `run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from aiprod_ds.config.data import AudioDataConfig
from aiprod_ds.config.losses import AudioVAELossConfig
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.run import EvaluationConfig, RunConfig, TrainerPath
from aiprod_ds.config.schema import StrictModel


class AudioMeasuresConfig(StrictModel):
    """Measures beside the distances of spectra and SI-SDR."""

    visqol: bool = False
    """ViSQOL in audio mode, 1 to about 4.7; needs the extra `perceptual`, clips of a second, and about as
    long as the clip lasts on one core."""


class AudioEvaluationConfig(EvaluationConfig):
    """How held-out clips are measured: always in the shape of the last phase, so that figures compare across
    phases."""

    measures: AudioMeasuresConfig = AudioMeasuresConfig()
    """What is measured beside the distances of spectra and SI-SDR."""


class AudioVAETrainerConfig(RunConfig):
    """Everything that the training of an audio VAE needs.

    The frames of a clip are its samples: a phase gives `duration: {seconds: 1.5}` or `{frames: 65536}` and no
    resolution.
    """

    has_stages: ClassVar[bool] = True

    trainer: Literal["audio_vae"] | TrainerPath = "audio_vae"
    """What is trained: by this name, or by the import path of a class derived from its trainer
    (`my_package.module:MyTrainer`)."""
    data: AudioDataConfig
    """The clips."""
    loss: AudioVAELossConfig = AudioVAELossConfig()
    """What is minimised."""
    evaluation: AudioEvaluationConfig = AudioEvaluationConfig()
    """What is measured on held-out clips."""

    def loss_weights(self) -> dict[str, float]:
        """Returns every `*_weight` of the loss section."""
        return self.loss.weights()

    def random_flip(self) -> bool:
        """Returns False: sound is not mirrored."""
        return False

    def clip_rate_hz(self) -> float | None:
        """Returns `data.sample_rate_hz`, to which all sounds are resampled."""
        return float(self.data.sample_rate_hz)

    @rule
    def _keys_without_effect(self) -> Iterator[str]:
        if self.model.spatial_stride is not None:
            yield (
                f"model.spatial_stride: has no effect for sound, got {self.model.spatial_stride}. Remove it."
            )
        for where, shape in self.phase_shapes():
            if shape.resolution is not None:
                size = f"{shape.resolution.height}x{shape.resolution.width}"
                yield f"{where}.resolution: has no effect for sound, got {size}. Remove it."
            if shape.duration is not None and shape.duration.frame_rate_hz is not None:
                yield (
                    f"{where}.duration.frame_rate_hz: has no effect for sound, got "
                    f"{shape.duration.frame_rate_hz:g}. "
                    "Remove it; data.sample_rate_hz is the rate."
                )
        for index, phase in enumerate(self.curriculum.phases):
            if phase.augment.random_flip is not None:
                yield (
                    f"curriculum.phases[{index}].augment.random_flip: has no effect for sound, got a value. "
                    "Remove it."
                )
