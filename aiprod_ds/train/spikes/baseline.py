"""How far a loss or a gradient norm stands above what it was: in robust deviations of its logarithm.

Owns the baseline of one series of values and its deviation; what follows from it is `detector.py`. Pure
Python floats, so that every process that was fed the same values says the same, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from aiprod_ds.config.optim import SpikesConfig
from aiprod_ds.errors import CheckpointError

_RENEWED_EVERY = 16
# A normal distribution has its median absolute deviation at 0.6745 and its 99th percentile at 2.326 sigma.
_MAD, _PERCENTILE, _OF_PERCENTILE = 1.4826, 0.99, 1 / 2.326
_ABOVE_HIGHEST = math.log(2.0)
_TAKEN_BACK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What values of late are like.

    With y = log x of the last `baseline_updates` values x, m their median and q their 99th percentile,

        deviation of x = (log x - m) / s,  s = max(1.4826 * median |y - m|, (q - m) / 2.326, floor)

    For a normal distribution both estimates are its sigma; the second one grows with a heavy tail upwards,
    which is healthy where it has been there all the time. The floor keeps a series that hardly moves from
    taking every movement for a spike. Values of 0 and below, which a loss of one's own may have, have no
    logarithm: a baseline with one of them is of the values themselves, with a floor relative to their size.

    Worked number: 1, 1, ... and a floor of 0.25: 2 stands log 2 / 0.25 = 2.77 deviations above.

    Attributes:
        centre: m.
        scale: s; 0 if nothing can be said.
        highest: The greatest y.
        is_logarithmic: Whether it is of logarithms.
    """

    centre: float
    scale: float
    highest: float
    is_logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float], *, floor: float) -> Baseline:
        """Returns the baseline of finite values, at least one."""
        is_logarithmic = min(values) > 0.0
        levels = sorted(map(math.log, values) if is_logarithmic else values)
        centre = median(levels)
        spread = median(abs(level - centre) for level in levels)
        tail = levels[min(math.ceil(_PERCENTILE * len(levels)), len(levels)) - 1] - centre
        least = floor if is_logarithmic else floor * median(map(abs, levels))
        scale = max(_MAD * spread, _OF_PERCENTILE * tail, least)
        return cls(centre=centre, scale=scale, highest=levels[-1], is_logarithmic=is_logarithmic)

    def deviation(self, value: float) -> float:
        """Returns how many scales a finite value stands above the centre; below it, less than 0."""
        if self.scale == 0.0 or (self.is_logarithmic and value <= 0.0):
            return 0.0
        level = math.log(value) if self.is_logarithmic else value
        return (level - self.centre) / self.scale

    def is_extreme(self, value: float, config: SpikesConfig) -> bool:
        """Returns whether one finite value is a spike; without logarithms by its deviation, and by standing a
        scale above the highest."""
        if self.deviation(value) < config.extreme_deviations:
            return False
        if not self.is_logarithmic:
            return value > self.highest + self.scale
        least = max(self.highest + _ABOVE_HIGHEST, self.centre + math.log(config.extreme_factor))
        return math.log(value) > least

    @property
    def typical(self) -> float:
        """The median value."""
        return math.exp(self.centre) if self.is_logarithmic else self.centre


@dataclass(slots=True, kw_only=True)
class Series:
    """One number an update, its baseline, and whether it stands high right now.

    While values stand high all of them wait, and join the baseline once that is over, so that a rise is
    judged by what was before it. The baseline is made anew after every 16 values that joined.

    Attributes:
        floor: Of the baseline.
        config: The rule.
        height: How many values stand high; each that does not takes three of them back.
    """

    floor: float
    config: SpikesConfig
    height: int = 0
    _known: list[float] = field(default_factory=list)
    _joined: int = 0
    _waiting: list[float] = field(default_factory=list)
    _baseline: Baseline | None = None

    def observe(self, value: float) -> float:
        """Takes a finite value in and returns its deviation; 0 while values are only collected."""
        baseline = self.baseline
        if baseline is None:
            self._join(value)
            return 0.0
        deviation = baseline.deviation(value)
        is_high = deviation >= self.config.sustained_deviations
        self.height = self.height + 1 if is_high else max(self.height - _TAKEN_BACK, 0)
        self._waiting.append(value)
        if not self.height:
            for waiting in self._waiting:
                self._join(waiting)
            self._waiting = []
        return deviation

    @property
    def baseline(self) -> Baseline | None:
        """What the next value is compared with; None while values are only collected."""
        if self._joined < self.config.warmup_updates:
            return None
        if self._baseline is None:
            whole = self._known[: len(self._known) - self._joined % _RENEWED_EVERY]
            self._baseline = Baseline.of(whole[-self.config.baseline_updates :], floor=self.floor)
        return self._baseline

    def forget(self) -> None:
        """Begins anew."""
        self._known, self._waiting, self._joined, self._baseline = [], [], 0, None
        self.height = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the state JSON-ready; floats as hexadecimal text, so that not a bit is lost."""
        return {
            "known": _text(self._known),
            "joined": self._joined,
            "waiting": _text(self._waiting),
            "height": self.height,
        }

    def restore(self, values: object) -> None:
        """Takes over what `to_dict` returned, under the rules of its own configuration.

        Raises:
            CheckpointError: If it is damaged.
        """
        try:
            assert isinstance(values, Mapping)
            known, waiting = _floats(values["known"]), _floats(values["waiting"])
            joined, height = values["joined"], values["height"]
            assert type(joined) is int
            assert type(height) is int
            assert 0 <= height <= len(waiting)
            assert len(known) == joined or joined > len(known) >= _RENEWED_EVERY
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"spikes: must be a saved series of values, got {str(values)[:80]!r}. The checkpoint is "
                "damaged."
            ) from error
        self._known, self._waiting, self._joined, self._baseline = known, waiting, joined, None
        self.height = height

    def _join(self, value: float) -> None:
        self._known.append(value)
        self._joined += 1
        if self._joined % _RENEWED_EVERY == 0:
            del self._known[: -self.config.baseline_updates - _RENEWED_EVERY]
            self._baseline = None


def _text(values: Sequence[float]) -> str:
    return " ".join(value.hex() for value in values)


def _floats(text: str) -> list[float]:
    found = [float.fromhex(word) for word in text.split()]
    assert all(map(math.isfinite, found))
    return found
