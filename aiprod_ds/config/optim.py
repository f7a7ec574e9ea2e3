"""The two running means that a run may keep: of its weights, and of its gradient norms.

Owns the schema; the formulas are in `aiprod_ds.optim.ema` and `aiprod_ds.optim.adaptive_clip`. Field names are the YAML keys.
"""

from __future__ import annotations

from aiprod_ds.config.schema import Fraction, PositiveFloat, PositiveInt, StrictModel


class EmaConfig(StrictModel):
    """An exponential moving average of the fp32 weights, for evaluation and export."""

    half_life_samples: PositiveInt = 200_000
    """Samples after which a weight counts half in the average. A batch of 32 decays by 0.99989 with 200000."""
    ramp: PositiveFloat | None = 0.05
    """The half-life is at most this part of the samples seen so far, so that the first weights are soon forgotten. null: no
    ramp."""


class AdaptiveClipConfig(StrictModel):
    """Clipping at mean + deviations * standard deviation of the gradient norms seen so far, never above
    `optimizer.gradient_clip_norm`."""

    smoothing: Fraction = 0.99
    """What a norm still counts one update later; 0.99 averages over about 100 updates, 1 over all."""
    deviations: PositiveFloat = 3.0
    """Standard deviations above the mean that are still let through."""
    warmup_updates: PositiveInt = 100
    """Norms that are only collected before the first limit."""
