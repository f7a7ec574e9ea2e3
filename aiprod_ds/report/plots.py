"""Curves of a run from its metrics.jsonl: every loss term, gradient and learning rate, speed, held-out
quality.

Phases are shaded in turns and named, from what ran (`clock/phase` of every row), not from what was planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from aiprod_ds.files import replacing
from aiprod_ds.metrics.jsonl import MetricRow
from aiprod_ds.metrics.metric_names import METRICS, find_metric
from aiprod_ds.report.curves import Curve, Floats, smooth
from aiprod_ds.report.summary import Picture

_LINE, _MARK, _BAND, _GRID, _TEXT = "#1f5fa8", "#c2410c", "#eef2f7", "#d5dbe3", "#5b6472"
_PANEL_WIDTH, _PANEL_HEIGHT = 4.6, 2.7
_LOG_FROM_RATIO = 5.0
_MAX_SHADED = 60  # more phases are narrower than what tells them apart


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    name: str
    first: float
    last: float


def save_plots(rows: Sequence[MetricRow], folder: Path, *, phase_names: Sequence[str]) -> tuple[Picture, ...]:
    """Writes loss.png, quality.png, training.png and speed.png, each only if it has something to show.

    Args:
        rows: What `jsonl.read_metrics` returns.
        folder: The `plots` folder of the run; made if it is missing.
        phase_names: Names of the phases, by index.

    Returns:
        What was written, with paths relative to the run folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    curves = _curves(rows)
    spans = _spans(rows, phase_names)
    figures: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("loss.png", ("loss/",), "Loss terms, raw and smoothed"),
        ("quality.png", ("evaluation/",), "Held-out clips"),
        ("training.png", ("learning_rate", "gradient/", "latent/"), "Learning rate, gradient, latents"),
        (
            "speed.png",
            ("throughput/", "time/update_seconds", "time/data_wait_seconds", "memory/"),
            "Speed and memory",
        ),
    )
    pictures = []
    for file_name, prefixes, caption in figures:
        shown = [curve for prefix in prefixes for curve in curves if curve.name.startswith(prefix)]
        if shown:
            _save_panels(shown, spans, folder / file_name)
            pictures.append(Picture(path=f"{folder.name}/{file_name}", caption=caption))
    return tuple(pictures)


def _curves(rows: Sequence[MetricRow]) -> list[Curve]:
    """Returns one curve per metric, in the order of the table, with terms of open groups after the listed
    ones."""
    names = {name for _, metrics in rows for name in metrics}
    order = {metric.name: index for index, metric in enumerate(METRICS)}
    curves = []
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        points = [(update, metrics[name]) for update, metrics in rows if name in metrics]
        updates, values = np.array(points, dtype=np.float64).T
        if name != "gradient/loss_scale" or (values != 1).any():
            curves.append(Curve(name=name, updates=updates, values=values))
    return curves


def _spans(rows: Sequence[MetricRow], phase_names: Sequence[str]) -> list[_Span]:
    bounds: dict[int, list[float]] = {}
    for update, metrics in rows:
        if "clock/phase" in metrics:
            bounds.setdefault(int(metrics["clock/phase"]), []).append(update)
    return [
        _Span(name=phase_names[index], first=min(found), last=max(found))
        for index, found in sorted(bounds.items())
    ]


def _save_panels(curves: Sequence[Curve], spans: Sequence[_Span], path: Path) -> None:
    columns = min(len(curves), 2 if len(curves) in {2, 4} else 3)
    rows = -(-len(curves) // columns)
    width = _PANEL_WIDTH * columns if columns > 1 else 1.6 * _PANEL_WIDTH
    figure = Figure(figsize=(width, _PANEL_HEIGHT * rows + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Iterator[Axes] = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for curve in curves:
        _draw(next(panels), curve, spans)
    for unused in panels:
        unused.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Axes, curve: Curve, spans: Sequence[_Span]) -> None:
    metric = find_metric(curve.name)
    unit, values = ("GiB", curve.values / 2**30) if metric.unit == "B" else (metric.unit, curve.values)
    if curve.name.startswith("evaluation/"):
        axes.plot(
            curve.updates,
            values,
            color=_MARK,
            linewidth=1.4,
            marker="o",
            markersize=4.5,
            clip_on=False,
            zorder=3,
        )
    elif curve.name in {"learning_rate", "gradient/loss_scale"}:
        axes.plot(curve.updates, values, color=_LINE, linewidth=1.4)
    else:
        axes.plot(curve.updates, values, color=_LINE, linewidth=0.7, alpha=0.3)
        for updates, smoothed in _smoothed_by_phase(curve.updates, values, spans):
            axes.plot(updates, smoothed, color=_LINE, linewidth=1.6)
    if curve.name.startswith(("loss/", "gradient/")) and _is_wide(values):
        _use_log_scale(axes)
    elif curve.name.startswith(("throughput/", "time/", "memory/", "learning_rate")):
        axes.set_ylim(0, 1.08 * max(values[np.isfinite(values)], default=0.0) or 1.0)
    title = metric.label if unit == "1" or unit in metric.label.split() else f"{metric.label} [{unit}]"
    _dress(axes, title, has_phase_names=len(spans) > 1)
    _shade(axes, spans)
    if spans:
        axes.set_xlim(min(spans[0].first - 0.5, curve.updates.min()), spans[-1].last + 0.5)


def _smoothed_by_phase(
    updates: Floats, values: Floats, spans: Sequence[_Span]
) -> Iterator[tuple[Floats, Floats]]:
    """Yields (updates, smoothed values) phase by phase: what a phase changes must not be smoothed away."""
    whole = _Span(name="", first=-np.inf, last=np.inf)
    for span in spans or (whole,):
        inside = (updates >= span.first) & (updates <= span.last)
        if inside.any():
            yield updates[inside], smooth(values[inside], max(1, int(inside.sum()) // 30))


def _is_wide(values: Floats) -> bool:
    """Returns whether a logarithmic scale can be used and shows more: the middle 96 % span more than a factor
    of five."""
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() <= 0:
        return False
    low, high = np.quantile(finite, (0.02, 0.98))
    return bool(high / low > _LOG_FROM_RATIO)


def _use_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes, title: str, *, has_phase_names: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left", pad=16 if has_phase_names else 6)
    axes.set_xlabel("update", fontsize=8, color=_TEXT)
    axes.tick_params(labelsize=8, colors=_TEXT, length=3)
    axes.tick_params(which="minor", length=0)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)


def _shade(axes: Axes, spans: Sequence[_Span]) -> None:
    if len(spans) > _MAX_SHADED:
        return
    style: dict[str, Any] = {"fontsize": 7.5, "color": _TEXT, "ha": "center", "va": "bottom"}
    for index, span in enumerate(spans):
        if index % 2 == 0:
            axes.axvspan(span.first - 0.5, span.last + 0.5, color=_BAND, linewidth=0, zorder=0)
        if len(spans) > 1:
            axes.text(
                (span.first + span.last) / 2, 1.02, span.name, transform=axes.get_xaxis_transform(), **style
            )
