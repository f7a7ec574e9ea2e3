"""Curves of a run's metrics: columns out of rows, where phases lie, smoothing, and fewer points for drawing.

Pure numbers; plots and the page draw them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from aiprod_ds.metrics.jsonl import MetricRow

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """The values of one metric at the updates that have it, in order."""

    name: str
    updates: Floats
    values: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The updates of one phase, as far as it ran."""

    index: int
    first: float
    last: float


def curves_of(rows: Sequence[MetricRow]) -> dict[str, Curve]:
    """Returns one curve for every metric, by name."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for update, metrics in rows:
        for name, value in metrics.items():
            updates, values = points.setdefault(name, ([], []))
            updates.append(update)
            values.append(value)
    return {
        name: Curve(
            name=name,
            updates=np.array(updates, dtype=np.float64),
            values=np.array(values, dtype=np.float64),
        )
        for name, (updates, values) in points.items()
    }


def spans_of(rows: Sequence[MetricRow]) -> list[Span]:
    """Returns where each phase that ran lies, by `clock/phase` of the rows."""
    bounds: dict[int, tuple[int, int]] = {}
    for update, metrics in rows:
        if "clock/phase" in metrics and np.isfinite(metrics["clock/phase"]):
            index = int(metrics["clock/phase"])
            first, last = bounds.get(index, (update, update))
            bounds[index] = min(first, update), max(last, update)
    return [Span(index=index, first=first, last=last) for index, (first, last) in sorted(bounds.items())]


def smooth(values: Floats, half_width: int) -> Floats:
    """Returns the mean of the finite values up to `half_width` places before and after each; NaN where there
    are none.

    Centred, so that it does not lag; shorter at both ends. Example: 1, 4, 7 with half width 1 give 2.5, 4,
    5.5.
    """
    is_finite = np.isfinite(values)
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the largest there are: no mean
        sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half_width, 0), np.minimum(places + half_width + 1, len(values))
    count = counts[last] - counts[first]
    with np.errstate(invalid="ignore"):
        smoothed: Floats = np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)
    return smoothed


def thin(xs: Floats, ys: Floats, max_points: int) -> tuple[Floats, Floats]:
    """Returns at most `max_points` of the points that look like all of them: of every stretch its lowest and
    its highest, in order. Values that are not finite are left out, except that a stretch without any other
    keeps one NaN, which parts the line."""
    if len(xs) <= max_points:
        return xs, ys
    edges = np.linspace(0, len(xs), max(max_points // 2, 1) + 1).astype(int)
    chosen: list[int] = []
    for first, end in pairwise(edges):
        part = ys[first:end]
        finite = np.flatnonzero(np.isfinite(part))
        if not len(finite):
            chosen.append(int(first))
            continue
        found = part[finite]
        chosen += sorted({int(first + finite[found.argmin()]), int(first + finite[found.argmax()])})
    places = np.array(chosen, dtype=int)
    return xs[places], np.where(np.isfinite(ys[places]), ys[places], np.nan)


def seconds_by_update(curves: Mapping[str, Curve]) -> tuple[Floats, Floats]:
    """Returns updates and the seconds trained by then, from the time of every update; where rows are left
    out, those between are taken to last as long as the next one."""
    curve = curves.get("time/update_seconds")
    if curve is None or not len(curve.updates):
        return np.array([0.0]), np.array([0.0])
    updates = np.concatenate([[0.0], curve.updates])
    seconds = np.where(np.isfinite(curve.values), curve.values, 0.0)
    with np.errstate(over="ignore"):
        passed = np.cumsum(np.maximum(np.diff(updates), 0.0) * seconds)
    return updates, np.concatenate([[0.0], passed])
