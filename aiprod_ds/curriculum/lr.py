"""The learning rate inside one phase: a pure function of the update's index, so there is nothing to save.

The loop writes `at(clock.phase_updates)` into the parameter groups before each update; DeepSpeed gets no
scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSchedule:
    """Linear warm-up to `peak`, then constant, linear or cosine decay to `peak * final_ratio`.

    With w = warmup_updates, n = updates, r = final_ratio and u counted from 0:

        u < w:     peak * ((u + 1) / w)
        otherwise: p = (u - w) / max(n - 1 - w, 1), at most 1
                   constant  peak
                   linear    peak * (1 - (1 - r) * p)
                   cosine    peak * (r + (1 - r) * (1 + cos(pi * p)) / 2)

    all of it times `factor`.

    The last warm-up update and the first after it both have `peak`; update n - 1 and all later ones have the
    final rate (if n - 1 > w; otherwise there is no room to decay).
    Worked number: peak 1e-4, cosine, w = 1000, n = 50001, r = 0.1: at(499) = 5e-5, at(25500) = 5.5e-5,
    at(50000) = 1e-5.

    Attributes:
        peak: Highest rate, > 0.
        kind: Shape after the warm-up.
        warmup_updates: Length of the warm-up, >= 0 and below `updates`.
        updates: Length of the phase; None while only the data can tell it, and then the rate does not decay.
        final_ratio: Final rate over peak, in [0, 1]; without effect for `constant`.
        factor: Of every rate, > 0.
    """

    peak: float
    kind: ScheduleKind
    warmup_updates: int
    updates: int | None
    final_ratio: float
    factor: float = 1.0

    @property
    def highest(self) -> float:
        """The rate at the end of the warm-up."""
        return self.factor * self.peak

    def at(self, phase_update: int) -> float:
        """Returns the rate of the phase's update with index `phase_update`, counted from 0; the final rate
        after the end."""
        return self.factor * self._without_factor(phase_update)

    def _without_factor(self, phase_update: int) -> float:
        if phase_update < self.warmup_updates:
            return self.peak * (
                (phase_update + 1) / self.warmup_updates
            )  # in this order the last one is the peak to the bit
        if self.kind == "constant" or self.updates is None:
            return self.peak
        after_warmup = phase_update - self.warmup_updates
        progress = min(after_warmup / max(self.updates - 1 - self.warmup_updates, 1), 1.0)
        remaining = 1.0 - progress if self.kind == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.peak * (self.final_ratio + (1.0 - self.final_ratio) * remaining)
