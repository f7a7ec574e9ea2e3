"""What the audio VAE's loss may be told: weights, STFT resolutions, mel scales.

Owns the schema; the formulas are in `aiprod_ds.losses.audio`, `.spectral` and `.mel`. Field names are the YAML keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.losses import LossConfig
from aiprod_ds.config.schema import NonNegativeFloat, PositiveFloat, PositiveInt, StrictModel

FFTSize = Annotated[int, Field(ge=4, multiple_of=4)]  # the hop is a quarter of it


class SpectralConfig(StrictModel):
    """STFT distance at several resolutions; `fft_sizes: [1024]` gives the single-resolution form (hop 256)."""

    fft_sizes: tuple[FFTSize, ...] = Field(default=(2048, 1024, 512, 256, 128, 64, 32), min_length=1, strict=False)
    """Windows in samples, multiples of 4; each hops by a quarter of itself."""
    log: Literal["log", "log1p"] = "log"
    """How magnitudes m are compared beside themselves: log(m + `log_epsilon`) or log(1 + m)."""
    log_epsilon: PositiveFloat = 1e-5
    """What keeps silence from an infinite logarithm; no effect with `log: log1p`, so refused there."""
    sum_difference: bool = True
    """Compares the sum and the difference of stereo channels beside left and right."""

    @model_validator(mode="after")
    def _log_epsilon_has_effect(self) -> Self:
        if self.log == "log1p" and self.log_epsilon != type(self).model_fields["log_epsilon"].default:
            raise ValueError(f"log_epsilon: has no effect with log1p, got {self.log_epsilon}. Remove it or set log to log.")
        return self


class MelConfig(StrictModel):
    """Log-mel distance at several resolutions, one number of bands for each FFT size."""

    fft_sizes: tuple[FFTSize, ...] = Field(default=(32, 64, 128, 256, 512, 1024, 2048), min_length=1, strict=False)
    """Windows in samples, multiples of 4; each hops by a quarter of itself."""
    num_bands: tuple[PositiveInt, ...] = Field(default=(5, 10, 20, 40, 80, 160, 320), min_length=1, strict=False)
    """Mel bands of each window, as many numbers as `fft_sizes`."""

    @model_validator(mode="after")
    def _one_number_for_each_size(self) -> Self:
        if len(self.num_bands) != len(self.fft_sizes):
            raise ValueError(
                f"num_bands: must have one number for each of the {len(self.fft_sizes)} fft_sizes, got {len(self.num_bands)}. "
                "Add or remove some."
            )
        return self


class AudioVAELossConfig(LossConfig):
    """Weights of the terms; a term with weight 0 is measured, not trained."""

    waveform_weight: NonNegativeFloat = 0.1
    """Weight of the mean absolute error of the samples."""
    spectral_weight: NonNegativeFloat = 1.0
    """Weight of the STFT distance."""
    kl_weight: NonNegativeFloat = 1e-4
    """Weight of the posterior's divergence from the unit normal, summed over channels."""
    mel_weight: NonNegativeFloat = 0.0
    """Weight of the log-mel distance. 0 in every phase: the term is not measured either. For a model of mel spectrograms: the
    weight of their mean absolute error, beside which those of waveform and spectrum must be 0."""
    spectral: SpectralConfig = SpectralConfig()
    """The STFT distance."""
    mel: MelConfig = MelConfig()
    """The log-mel distance."""

    @model_validator(mode="after")
    def _something_is_reconstructed(self) -> Self:
        if self.waveform_weight == self.spectral_weight == self.mel_weight == 0:
            raise ValueError(
                "waveform_weight: this, spectral_weight or mel_weight must exceed 0, got 0 for all. Raise one of them."
            )
        return self

    def weights(self) -> dict[str, float]:
        """Returns the fields that a phase may override, by name: every `*_weight`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_weight")}
