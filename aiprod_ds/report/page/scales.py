"""Scales of charts: which values an axis shows, and the round ones among them that get a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aiprod_ds.report.curves import Floats
from aiprod_ds.report.words import count_text, duration, four_digits

_LOG_FROM_RATIO, _LOG_TO_RATIO = 5.0, 1e30  # beyond, what the margins are made of overflows
_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The values of one direction; `place` is 0 at `low` and 1 at `high`."""

    low: float
    high: float
    is_log: bool = False

    def places(self, values: Floats) -> Floats:
        """Returns where values lie, from 0 to 1 inside the axis."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        with np.errstate(divide="ignore", invalid="ignore"):
            raw: Floats = np.log(values) if self.is_log else values
            shares: Floats = (raw - low) / ((high - low) or 1.0)
        return shares

    def place(self, value: float) -> float:
        """Returns where one value lies, in percent."""
        return round(100 * float(self.places(np.array([value]))[0]), 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A labelled place on an axis, in percent."""

    place: float
    text: str


def x_axis(all_xs: Sequence[Floats]) -> Axis:
    """Returns an axis from 0 to the largest value of any series, at least to 1."""
    finite = [xs[np.isfinite(xs)] for xs in all_xs]
    return Axis(low=0.0, high=max([1.0, *(float(xs.max()) for xs in finite if len(xs))]))


def y_axis(shown: Sequence[Floats], *, from_zero: bool, may_be_log: bool, pad: float = 0.05) -> Axis:
    """Returns an axis over nearly all values; a few wild ones are cut off rather than flatten the rest."""
    values = np.concatenate(list(shown))
    low, high = float(values.min()), float(values.max())
    if len(values) > 50:
        low, high = (float(value) for value in np.quantile(values, (0.002, 0.998)))
    if may_be_log and values.min() > 0 and _LOG_FROM_RATIO < high / low < _LOG_TO_RATIO:
        ratio = (high / low) ** pad
        return Axis(low=low / ratio, high=high * ratio, is_log=True)
    if from_zero and low >= 0:
        return Axis(low=0.0, high=1.08 * high or 1.0)
    if high == low == 0:
        return Axis(low=0.0, high=1.0)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        return Axis(low=low - room, high=high + room)
    room = pad * (high - low)
    return Axis(low=low - room, high=high + room)


def y_ticks(axis: Axis, count: int = 4) -> tuple[Tick, ...]:
    """Returns round values along an axis, with their text."""
    values = _log_values(axis, count) if axis.is_log else _round_values(axis.low, axis.high, count)
    return tuple(
        Tick(place=axis.place(value), text=four_digits(float(f"{value:.6g}")))
        for value in values
        if -0.5 <= axis.place(value) <= 100.5
    )


def x_ticks(axis: Axis) -> tuple[Tick, ...]:
    """Returns round updates along an axis."""
    values = [value for value in _round_values(axis.low, axis.high, 5) if value <= axis.high * 1.001]
    values = [value for value in values if value == int(value)]  # there is no update 2.5
    return tuple(Tick(place=axis.place(value), text=_count(value)) for value in values)


def time_ticks(axis: Axis) -> tuple[Tick, ...]:
    """Returns round times along an axis in seconds."""
    step = next(
        (step for step in _SECONDS if axis.high / step <= 5.5), 86400 * max(1, round(axis.high / 432000))
    )
    values = np.arange(0, axis.high * 1.001, step).tolist()
    return tuple(Tick(place=axis.place(value), text=_short_time(value)) for value in values)


def _short_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:g} min" if seconds % 30 == 0 else duration(seconds)
    return f"{seconds / 3600:g} h" if seconds < 4 * 86400 else f"{seconds / 86400:g} d"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 100_000 else count_text(int(value)).replace(" ", "")


def _round_values(low: float, high: float, count: int) -> list[float]:
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_values(axis: Axis, count: int) -> list[float]:
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for digits in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        values = [d * 10.0**p for p in powers for d in digits if axis.low <= d * 10.0**p <= axis.high]
        if len(values) <= 2 * count:
            return values
    return values[:: math.ceil(len(values) / count)]
