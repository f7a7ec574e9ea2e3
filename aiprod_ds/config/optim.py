"""How the loss is minimised: AdamW, its clipping, the running means of weights and gradient norms that a run
may keep, and what it does about spikes.

Owns the schema; the formulas are in `aiprod_ds.optim.ema`, `aiprod_ds.optim.adaptive_clip` and
`aiprod_ds.train.spikes`. Field names are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)


class EmaConfig(StrictModel):
    """An exponential moving average of the fp32 weights, for evaluation and export."""

    half_life_samples: PositiveInt = 200_000
    """Samples after which a weight counts half in the average. A batch of 32 decays by 0.99989 with
    200000."""
    ramp: PositiveFloat | None = 0.05
    """The half-life is at most this part of the samples seen so far, so that the first weights are soon
    forgotten. null: no ramp."""


class AdaptiveClipConfig(StrictModel):
    """Clipping at mean + deviations * standard deviation of the gradient norms seen so far, never above
    `optimizer.gradient_clip_norm`."""

    smoothing: Fraction = 0.99
    """What a norm still counts one update later; 0.99 averages over about 100 updates, 1 over all."""
    deviations: PositiveFloat = 3.0
    """Standard deviations above the mean that are still let through."""
    warmup_updates: PositiveInt = 100
    """Norms that are only collected before the first limit."""


class OptimizerConfig(StrictModel):
    """AdamW; the learning rate belongs to the phases. Vectors and biases are not decayed."""

    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), strict=False)
    """Decay of the first and of the second moment, per update."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of matrices and kernels; times the learning rate in each update."""
    gradient_clip_norm: PositiveFloat | None = 1.0
    """Global L2 norm to which a longer gradient is scaled down. null: no clipping."""
    adaptive_clip: AdaptiveClipConfig | None = None
    """Also clips at a limit that follows the norms of the run. null: only `gradient_clip_norm` clips."""


class SpikesConfig(StrictModel):
    """What ends a stretch of training that went wrong: it is taken back to the last good checkpoint, and its
    data is left out. How far a value stands above its baseline is counted in robust deviations of its
    logarithm; see `aiprod_ds.train.spikes.baseline` for the exact rule."""

    mode: Literal["roll_back", "off"] = "roll_back"
    """`off`: nothing is looked for. What was left out before stays left out."""
    skipped_in_a_row: PositiveInt = 3
    """Updates in a row without a finite gradient that are a spike; those with which an fp16 loss scale looks
    for its height do not count."""
    extreme_deviations: PositiveFloat = 8.0
    """Deviations of one loss or gradient norm above the baseline that are a spike, if it is also more than
    `extreme_factor` times the median and twice the highest of the baseline."""
    extreme_factor: PositiveFloat = Field(default=40.0, ge=1)
    """How many times the median a single value must be: rare clips with ten times the gradient are healthy,
    and clipping bounds what they do."""
    sustained_deviations: PositiveFloat = 5.0
    """Deviations of `sustained_updates` losses or gradient norms that are a spike. At most
    `extreme_deviations`."""
    sustained_updates: PositiveInt = 20
    """Updates that must be so high; each between them that is not takes three back."""
    baseline_updates: PositiveInt = Field(default=256, ge=32, le=4096)
    """Updates before that a value is compared with; of the same phase."""
    warmup_updates: PositiveInt = Field(default=100, ge=16)
    """Updates of a phase, and after a new term of its loss, whose values are only collected. At most
    `baseline_updates`."""
    max_rollbacks: NonNegativeInt = 3
    """Rollbacks before the run stops and says what it knows; 0 stops at the first spike. A change of the
    phase's `learning_rate_factor`, and another phase, begin to count anew."""
    counted_updates: PositiveInt | None = 10_000
    """Only rollbacks of so many updates before count. null: all of the phase."""

    @rule
    def _ordered(self) -> Iterator[str]:
        if self.sustained_deviations > self.extreme_deviations:
            yield (
                f"sustained_deviations: must be at most extreme_deviations ({self.extreme_deviations:g}), "
                f"got {self.sustained_deviations:g}. Lower it or raise the other."
            )
        if self.warmup_updates > self.baseline_updates:
            yield (
                f"warmup_updates: must be at most baseline_updates ({self.baseline_updates}), got "
                f"{self.warmup_updates}. Lower it or raise the other."
            )
