"""What flow matching may be told: how noise levels are drawn, how modalities are weighed, what stays clean.

Owns the schema; the formulas are in `aiprod_ds.losses.flow`. Field names are the YAML keys.
"""

from __future__ import annotations

from pydantic import model_validator
from typing_extensions import Self

from aiprod_ds.config.losses import LossConfig
from aiprod_ds.config.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, StrictModel


class NoiseLevelConfig(StrictModel):
    """Logit-normal noise levels whose mean shifts with the number of tokens.

    The shift is the line through (`low_tokens`, `low_shift`) and (`high_tokens`, `high_shift`), kept within [`min_shift`,
    `max_shift`]; null for either end takes that bound away. A `uniform_fraction` of the levels is uniform instead.
    """

    low_tokens: PositiveInt = 1024
    """Latent tokens of a clip at the line's first point."""
    low_shift: float = 0.95
    """Mean of the logit of the noise level there."""
    high_tokens: PositiveInt = 4096
    """Latent tokens at the second point; above `low_tokens`."""
    high_shift: float = 2.05
    """Mean of the logit there."""
    min_shift: float | None = 0.5
    """The mean of the logit is not below this. null: it may be."""
    max_shift: float | None = 3.0
    """The mean of the logit is not above this. null: it may be; from some 50,000 tokens on nearly every level is then 1."""
    standard_deviation: PositiveFloat = 1.0
    """Of the logit."""
    uniform_fraction: Fraction = 0.1
    """Share of the samples whose level is drawn evenly from 0 to 1."""

    @model_validator(mode="after")
    def _the_line_and_the_bounds_are_ordered(self) -> Self:
        problems = []
        if self.high_tokens <= self.low_tokens:
            problems.append(f"high_tokens: must exceed low_tokens ({self.low_tokens}), got {self.high_tokens}. Swap them.")
        if self.min_shift is not None and self.max_shift is not None and self.max_shift < self.min_shift:
            problems.append(f"max_shift: must not be below min_shift ({self.min_shift}), got {self.max_shift}. Swap them.")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class FlowConfig(LossConfig):
    """The objective of the diffusion trainer. Modalities have their own noise level unless `shared_noise_level` is set."""

    noise_level: NoiseLevelConfig = NoiseLevelConfig()
    """How noisy the samples are made."""
    video_weight: NonNegativeFloat = 1.0
    """Weight of the video loss."""
    audio_weight: NonNegativeFloat = 0.25
    """Weight of the audio loss, where the model makes sound."""
    shared_noise_level: bool = False
    """Whether the sound of a clip has the noise level of its pictures, instead of one of its own."""
    first_frame_probability: Fraction = 0.0
    """Share of the clips whose first latent frame is given without noise and not trained, for image-to-video."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.video_weight == self.audio_weight == 0:
            raise ValueError("video_weight: this or audio_weight must exceed 0, got 0 for both. Raise one of them.")
        return self
