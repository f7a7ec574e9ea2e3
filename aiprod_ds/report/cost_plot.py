"""The estimate of a run as a picture: memory of a GPU and GPU-hours by phase. Reads the estimate's document,
nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aiprod_ds.bad_disk import disk_required
from aiprod_ds.files import replacing
from aiprod_ds.report.cost_view import PARTS

_COLOURS = {
    "blue": "#4477aa",
    "magenta": "#aa3377",
    "green": "#228833",
    "white": "#bbbbbb",
    "yellow": "#ccbb44",
    "cyan": "#66ccee",
}


def save_cost_plot(document: Mapping[str, Any], memory_bytes: int, path: Path) -> None:
    """Writes a PNG: for every phase, as configured and with the fastest settings that fit, memory by part and
    GPU-hours.

    Args:
        document: What `aiprod_ds.train.planning.estimate.Estimate.document` returns.
        memory_bytes: What one card has for torch; drawn as a line.
        path: Its folder must exist.
    """
    rows = [
        (f"{row['name']}\n{title}", row)
        for title, key in (("as configured", "configured"), ("fastest", "chosen"))
        for row in document[key]
    ]
    figure = Figure(figsize=(max(6.0, 1.6 * len(rows) + 3), 7.0), layout="constrained")
    memory, hours = figure.subplots(2, 1)
    names = [name for name, _ in rows]
    _stack(memory, names, [row for _, row in rows])
    memory.axhline(memory_bytes / 1e9, color="black", linestyle="--", label=f"card ({document['machine']})")
    memory.set_ylabel("GB of one GPU")
    memory.set_title(f"{document['gpus']} x {document['machine']}, estimated")
    memory.legend(fontsize="small", ncols=2)
    hours.bar(range(len(rows)), [row["gpu_hours"] for _, row in rows], color="#4477aa")
    hours.set_xticks(range(len(rows)), names, fontsize="small")
    hours.set_ylabel("GPU-hours")
    with disk_required(path, "the plot"), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=120)


def _stack(axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    bottom = [0.0] * len(rows)
    for part, colour in PARTS.items():
        heights = [row["memory"][part] / 1e9 for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottom, color=_COLOURS[colour], label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    rest = [row["memory"]["needed"] / 1e9 - below for row, below in zip(rows, bottom, strict=True)]
    axes.bar(
        range(len(rows)),
        rest,
        bottom=bottom,
        color="none",
        edgecolor="black",
        hatch="//",
        label="fragmentation, context",
    )
    axes.set_xticks(range(len(rows)), names, fontsize="small")
