"""Charts as the page's template draws them: lines in a box of 1000 by 300 that stretches with the screen, and
everything with text in it as places in percent, so that letters keep their size on a phone.

Owns paths and places; the scales are `scales.py`, colours and sizes the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from aiprod_ds.report.curves import Curve, Floats, Span, smooth, thin
from aiprod_ds.report.page.scales import Axis, Tick, time_ticks, x_axis, x_ticks, y_axis, y_ticks
from aiprod_ds.report.words import four_digits

WIDTH, HEIGHT = 1000, 300
_RAW_POINTS, _LINE_POINTS = 700, 350
_MAX_BANDS = 60
_MIN_NAMED = 7.0  # percent of the width


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A path in the box; `style` names its class in the style sheet."""

    path: str
    style: str
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A measured point, in percent from the left and from the bottom."""

    left: float
    bottom: float
    text: str
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A stretch of the width, in percent: a phase."""

    left: float
    width: float
    name: str
    style: str = ""

    @property
    def is_named(self) -> bool:
        """Whether there is room for its name."""
        return self.width >= _MIN_NAMED


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One setting of the curriculum over the width of a chart: its steps, and its value in every phase."""

    title: str
    path: str
    bands: tuple[Band, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything that the template needs to draw one chart; `alt` says it in words."""

    title: str
    unit: str
    latest: str
    alt: str
    x: Axis
    y: Axis
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...] = ()
    bands: tuple[Band, ...] = ()
    lanes: tuple[Lane, ...] = ()
    note: str = ""
    x_title: str = "update"


def curve_chart(
    curve: Curve,
    *,
    title: str,
    unit: str,
    spans: Sequence[Span] = (),
    names: Mapping[int, str] | None = None,
    is_smoothed: bool = True,
    from_zero: bool = False,
    may_be_log: bool = False,
) -> Chart | None:
    """Returns the chart of a metric over updates; None if no value is finite.

    Args:
        curve: Values in the unit that is shown.
        title: Over the chart.
        unit: Beside the title; empty for a plain number.
        spans: The phases as they ran; smoothing does not cross from one to the next.
        names: Of phases, by index.
        is_smoothed: Whether a smoothed line is drawn over the pale values.
        from_zero: Whether the lower edge is zero.
        may_be_log: Whether values over more than a factor of five get a logarithmic scale.
    """
    finite = np.isfinite(curve.values)
    if not finite.any():
        return None
    x = x_axis([curve.updates])
    lines = []
    shown = [curve.values[finite]]
    if is_smoothed:
        parts = list(_smoothed(curve, spans))
        y = y_axis(shown, from_zero=from_zero, may_be_log=may_be_log)
        lines.append(Line(path=_path(*thin(curve.updates, curve.values, _RAW_POINTS), x, y), style="raw"))
        path = " ".join(_path(*thin(*part, _LINE_POINTS), x, y) for part in parts)
        lines.append(Line(path=path, style="main", label=title))
    else:
        y = y_axis(shown, from_zero=from_zero, may_be_log=may_be_log)
        path = _path(*thin(curve.updates, curve.values, _RAW_POINTS), x, y)
        lines.append(Line(path=path, style="main", label=title))
    last = float(curve.values[finite][-1])
    return Chart(
        title=title,
        unit=unit,
        latest=four_digits(last),
        alt=_alt(title, unit, curve.updates[finite], curve.values[finite]),
        x=x,
        y=y,
        x_ticks=x_ticks(x),
        y_ticks=y_ticks(y),
        lines=tuple(lines),
        bands=bands_of(spans, names or {}, x),
        note=_missing(curve.values),
    )


def points_chart(
    curve: Curve, *, title: str, unit: str, digits: int, x_end: float, spans: Sequence[Span] = ()
) -> Chart | None:
    """Returns the chart of something measured now and then: every value is a dot.

    Args:
        curve: Values and the updates that they were measured at.
        title: Over the chart.
        unit: Beside the title.
        digits: Of a value's text, behind the point.
        x_end: The run's newest update, so that charts of one run have one width.
        spans: The phases as they ran.
    """
    finite = np.isfinite(curve.values)
    if not finite.any():
        return None
    updates, values = curve.updates[finite], curve.values[finite]
    x = Axis(low=0.0, high=max(x_end, float(updates.max()), 1.0))
    y = y_axis([values], from_zero=False, may_be_log=False, pad=0.12)
    dots = []
    if len(values) <= _LINE_POINTS:
        dots = [
            Dot(left=x.place(update), bottom=y.place(value), text=f"update {update:,.0f}: {value:.{digits}f}")
            for update, value in zip(updates.tolist(), values.tolist(), strict=True)
        ]
    return Chart(
        title=title,
        unit=unit,
        latest=f"{values[-1]:.{digits}f}",
        alt=_alt(title, unit, updates, values),
        x=x,
        y=y,
        x_ticks=x_ticks(x),
        y_ticks=y_ticks(y),
        lines=(Line(path=_path(*thin(updates, values, _RAW_POINTS), x, y), style="measured", label=title),),
        dots=tuple(dots),
        bands=bands_of(spans, {}, x),
        note=_missing(curve.values),
    )


def shared_chart(
    series: Sequence[tuple[str, Floats, Floats]],
    *,
    title: str,
    unit: str,
    x_title: str,
    has_dots: bool = False,
    may_be_log: bool = False,
) -> Chart | None:
    """Returns one chart of several runs on the same axes; None if nothing in them is finite.

    Args:
        series: Name of the run, its updates or seconds, its values.
        title: Over the chart.
        unit: Beside the title.
        x_title: `update` or `time`, which is in seconds.
        has_dots: Whether values are measured points, which are drawn as they are.
        may_be_log: As of `curve_chart`.
    """
    kept = [(name, xs, ys) for name, xs, ys in series if np.isfinite(ys).any()]
    if not kept:
        return None
    x = x_axis([xs for _, xs, _ in kept])
    y = y_axis([ys[np.isfinite(ys)] for _, _, ys in kept], from_zero=False, may_be_log=may_be_log, pad=0.08)
    lines, dots, words = [], [], []
    order = [name for name, _, _ in series]
    for name, xs, ys in kept:
        style = f"run-{order.index(name) % 8}"
        drawn = ys if has_dots else smooth(ys, max(1, len(ys) // 60))
        lines.append(Line(path=_path(*thin(xs, drawn, _LINE_POINTS), x, y), style=style, label=name))
        finite = np.isfinite(ys)
        words.append(f"{name}: {four_digits(float(ys[finite][-1]))}")
        if has_dots and finite.sum() <= _LINE_POINTS:
            dots += [
                Dot(left=x.place(a), bottom=y.place(b), text=f"{name}: {four_digits(b)}", style=style)
                for a, b in zip(xs[finite].tolist(), ys[finite].tolist(), strict=True)
            ]
    ticks = x_ticks(x) if x_title == "update" else time_ticks(x)
    return Chart(
        title=title,
        unit=unit,
        latest="",
        alt=f"{title} over {x_title}, at the end {'; '.join(words)}.",
        x=x,
        y=y,
        x_ticks=ticks,
        y_ticks=y_ticks(y),
        lines=tuple(lines),
        dots=tuple(dots),
        x_title=x_title,
    )


def with_lanes(chart: Chart, lanes: Sequence[Lane]) -> Chart:
    """Returns the chart with settings of the curriculum drawn over it."""
    return replace(chart, lanes=tuple(lanes))


def lane(
    title: str, spans: Sequence[Span], values: Sequence[float], texts: Sequence[str], x: Axis
) -> Lane | None:
    """Returns the steps of one setting over a chart's width; None if it never changes and there are phases to
    change it in, or if nothing is known.

    Args:
        title: Of the setting.
        spans: The phases as they ran.
        values: One for each span, 0 or more.
        texts: The same as it is read.
        x: Of the chart.
    """
    top = max(values, default=0.0)
    if top <= 0:
        return None
    path, bands = [], []
    for span, value in zip(spans, values, strict=True):
        left, right = _edges(span, x)
        height = HEIGHT - round(HEIGHT * (0.15 + 0.85 * value / top))
        path.append(f"M{10 * left:.1f},{HEIGHT}V{height}H{10 * right:.1f}V{HEIGHT}Z")
    if len(spans) <= _MAX_BANDS:
        for span, text in zip(spans, texts, strict=True):
            left, right = _edges(span, x)
            bands.append(Band(left=left, width=round(right - left, 2), name=text))
    return Lane(title=title, path="".join(path), bands=tuple(bands))


def bands_of(spans: Sequence[Span], names: Mapping[int, str], x: Axis) -> tuple[Band, ...]:
    """Returns the phases as bands; none if they are too many to be told apart, or only one."""
    if not 1 < len(spans) <= _MAX_BANDS:
        return ()
    found = []
    for place, span in enumerate(spans):
        left, right = _edges(span, x)
        style = "odd" if place % 2 else "even"
        name = names.get(span.index, "")
        found.append(Band(left=left, width=round(right - left, 2), name=name, style=style))
    return tuple(found)


def _path(xs: Floats, ys: Floats, x: Axis, y: Axis) -> str:
    """Returns the SVG path; a value that is not finite parts the line. Wild values end just outside the
    box."""
    across = WIDTH * x.places(xs)
    down = HEIGHT * (1 - np.clip(y.places(ys), -0.2, 1.2))
    words, pen = [], "M"
    for a, b in zip(across.tolist(), down.tolist(), strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            pen = "M"
            continue
        words.append(f"{pen}{a:.1f},{b:.1f}")
        pen = "L"
    if len(words) == 1:  # a line of one point would not be seen
        words.append("h0.1")
    return "".join(words)


def _smoothed(curve: Curve, spans: Sequence[Span]) -> list[tuple[Floats, Floats]]:
    """Returns updates and smoothed values phase by phase: what a phase changes must not be smoothed away."""
    if not 1 <= len(spans) <= _MAX_BANDS:
        return [(curve.updates, smooth(curve.values, max(1, len(curve.values) // 60)))]
    parts = []
    for span in spans:
        first, end = np.searchsorted(curve.updates, [span.first, span.last + 0.5])
        if end > first:
            values = curve.values[first:end]
            parts.append((curve.updates[first:end], smooth(values, max(1, len(values) // 30))))
    return parts


def _edges(span: Span, x: Axis) -> tuple[float, float]:
    return x.place(max(span.first - 1, x.low)), x.place(min(span.last, x.high))


def _alt(title: str, unit: str, updates: Floats, values: Floats) -> str:
    unit = f" {unit}" if unit else ""
    return (
        f"{title}: {four_digits(float(values[0]))}{unit} at update {updates[0]:,.0f}, "
        f"{four_digits(float(values[-1]))}{unit} at update {updates[-1]:,.0f}, lowest "
        f"{four_digits(float(values.min()))}, highest {four_digits(float(values.max()))}."
    )


def _missing(values: Floats) -> str:
    lost = int((~np.isfinite(values)).sum())
    return f"{lost:,} of {len(values):,} values are not finite and not drawn." if lost else ""
