"""Dynamic loss scaling for fp16, with the rules of DeepSpeed 0.19.8 (`runtime/fp16/loss_scaler.py`,
DynamicLossScaler).

Owns when the scale doubles and halves, nothing about tensors. `LocalEngine` uses it; `DeepSpeedEngine` uses
DeepSpeed's own.

Two deviations on purpose: an overflow at the minimum scale is not an exception (it is reported as a skipped
update), and the scale of an update is the one that its loss was multiplied with, also when the scale doubles
at that update.
"""

from __future__ import annotations

from aiprod_ds.config.deepspeed import LossScaleSettings
from aiprod_ds.snapshot import LossScale

_SCALE_FACTOR = 2.0


class LossScaler:
    """The scale of the next backward pass.

    scale -> max(scale / 2, min) after `hysteresis` overflows, scale -> 2 * scale after `loss_scale_window`
    updates without one. Worked example: power 4, window 2, hysteresis 1: scale 16; an overflow gives 8; two
    good updates later it stays 8 (the window counts whole updates after the one that follows the overflow)
    and the third makes it 16.
    """

    def __init__(self, settings: LossScaleSettings | None) -> None:
        self._settings = settings
        is_dynamic = settings is not None and settings.loss_scale == 0
        self._dynamic = settings if is_dynamic else None
        self.scale: float = 1.0
        if settings is not None:
            self.scale = 2.0**settings.initial_scale_power if is_dynamic else settings.loss_scale
        self._updates = 0
        self._last_overflow = -1
        self._tolerance = settings.hysteresis if settings is not None else 1

    def update(self, *, overflow: bool) -> None:
        """Sets the next scale from whether this update's gradients overflowed."""
        settings = self._dynamic
        if settings is None:
            return
        if overflow:
            if self._tolerance == 1:
                self.scale = max(self.scale / _SCALE_FACTOR, float(settings.min_loss_scale))
            else:
                self._tolerance -= 1
            self._last_overflow = self._updates
        else:
            stable = self._updates - self._last_overflow - 1
            grows = stable > 0 and stable % settings.loss_scale_window == 0
            if settings.consecutive_hysteresis or grows:
                self._tolerance = settings.hysteresis
            if grows:
                self.scale *= _SCALE_FACTOR
        self._updates += 1

    def state(self) -> LossScale | None:
        """Returns what changes over time; None if nothing does."""
        if self._dynamic is None:
            return None
        return LossScale(
            scale=self.scale,
            updates=self._updates,
            last_overflow=self._last_overflow,
            tolerance=self._tolerance,
        )

    def restore(self, state: LossScale | None) -> None:
        """Goes on from what `state` returned, under the rules of its own settings; if one of the two has
        none, as it is."""
        if self._dynamic is None or state is None:
            return
        self.scale, self._updates, self._last_overflow = state.scale, state.updates, state.last_overflow
        self._tolerance = min(state.tolerance, self._dynamic.hysteresis)
