"""When a loss has stopped falling: an exponential mean and a patience counter, exact to the last bit after
resume.

Pure state machine on Python floats; every rank feeds the same reduced loss and reaches the same answer. Used
by `scheduler` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiprod_ds.config.phase import PlateauConfig
from aiprod_ds.errors import CheckpointError, NonFiniteError

_COUNTS = ("losses", "best_at", "non_finite_run", "non_finite")
_FLOATS = ("average", "weight", "best")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauState:
    """What a plateau has seen so far.

    With s = smoothing, after each finite loss x:

        average = s * average + (1 - s) * x
        weight  = s * weight + (1 - s)          (this is 1 - s^n, without a power)
        smooth  = average / weight              (bias correction: a constant loss gives itself at once)

    The first ceil(1 / (1 - s)) losses only fill the mean, so that one lucky value cannot become the mark.
    Then `best` is the smoothed loss of the last real improvement, which is smooth < best - threshold *
    |best|. The plateau is reached when `patience_updates` finite losses brought no improvement. So a rising
    loss is no improvement and ends the phase, noise is averaged out, and slow progress counts as soon as it
    adds up to the threshold within the patience.

    NaN and infinite losses are left out of the mean and of the patience, and counted; `patience_updates` of
    them in a row raise `NonFiniteError`, because the phase can no longer be judged.

    Worked numbers: s = 0.5, losses 4, 2: average 2 then 2, weight 0.5 then 0.75, smooth 4 then 2.6667.

    Attributes:
        losses: Finite losses seen.
        best_at: Value of `losses` at the last improvement; 0 while the mean still fills.
        non_finite_run: Non-finite losses since the last finite one.
        non_finite: Non-finite losses in all.
    """

    average: float = 0.0
    weight: float = 0.0
    best: float = math.inf
    losses: int = 0
    best_at: int = 0
    non_finite_run: int = 0
    non_finite: int = 0

    def observe(self, loss: float, rule: PlateauConfig) -> PlateauState:
        """Returns the state after one loss.

        Raises:
            NonFiniteError: If the last `patience_updates` losses were all NaN or infinite.
        """
        if not math.isfinite(loss):
            return self._after_non_finite(rule)
        average = rule.smoothing * self.average + (1.0 - rule.smoothing) * loss
        weight = rule.smoothing * self.weight + (1.0 - rule.smoothing)
        losses = self.losses + 1
        seen = replace(self, average=average, weight=weight, losses=losses, non_finite_run=0)
        smooth = average / weight
        if losses < filling_updates(rule):
            return seen
        if self.best == math.inf or smooth < self.best - rule.threshold * abs(self.best):
            return replace(seen, best=smooth, best_at=losses)
        return seen

    def reached(self, rule: PlateauConfig) -> bool:
        """Returns whether `patience_updates` losses have passed since the last improvement."""
        return self.best_at > 0 and self.losses - self.best_at >= rule.patience_updates

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a JSON-ready mapping; floats as hexadecimal text, so that not a bit is
        lost."""
        return {name: getattr(self, name).hex() for name in _FLOATS} | {
            name: getattr(self, name) for name in _COUNTS
        }

    @classmethod
    def from_dict(cls, values: object) -> PlateauState:
        """Returns the state saved by `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or out of range.
        """
        damaged = CheckpointError(
            f"curriculum.plateau: must be a saved plateau state, got {values!r}. The checkpoint is damaged; "
            "use an earlier one."
        )
        if not isinstance(values, Mapping) or set(values) != {*_COUNTS, *_FLOATS}:
            raise damaged
        if any(type(values[name]) is not int or values[name] < 0 for name in _COUNTS):
            raise damaged
        try:
            numbers: dict[str, Any] = {name: float.fromhex(values[name]) for name in _FLOATS}
        except (TypeError, ValueError, OverflowError):
            raise damaged from None
        if not math.isfinite(numbers["average"] + numbers["weight"]) or math.isnan(numbers["best"]):
            raise damaged
        return cls(**numbers, **{name: values[name] for name in _COUNTS})

    def _after_non_finite(self, rule: PlateauConfig) -> PlateauState:
        run = self.non_finite_run + 1
        if run >= rule.patience_updates:
            raise NonFiniteError(
                f"plateau: the loss must be finite at least once in {rule.patience_updates} updates, got "
                f"{run} NaN or infinite "
                "losses in a row. Lower the learning rate or resume from an earlier checkpoint."
            )
        return replace(self, non_finite_run=run, non_finite=self.non_finite + 1)


def earliest_plateau(rule: PlateauConfig) -> int:
    """Returns after how many finite losses a plateau can be reached at the earliest."""
    return filling_updates(rule) + rule.patience_updates


def filling_updates(rule: PlateauConfig) -> int:
    """Returns how many losses only fill the mean: ceil(1 / (1 - smoothing)), for example 50 at 0.98."""
    return math.ceil(round(1.0 / (1.0 - rule.smoothing), 9))
