"""How the loss is minimised: AdamW, its clipping, and the running means of weights and gradient norms that a
run may keep.

Owns the schema; the formulas are in `aiprod_ds.optim.ema` and `aiprod_ds.optim.adaptive_clip`. Field names
are the YAML keys.
"""

from __future__ import annotations

from pydantic import Field

from aiprod_ds.config.schema import (
    Fraction,
    NonNegativeFloat,
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
