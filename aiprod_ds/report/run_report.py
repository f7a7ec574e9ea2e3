"""The result of a run as files: report.json for programs, report.md for people; and start.json, what is known
before the first update.

Owns how a `RunSummary` becomes JSON; the text is laid out in `report_view`, report.html in `page`. Files are
replaced as a whole, so a reader never sees half a report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiprod_ds.files import write_atomically
from aiprod_ds.report.report_view import render_report
from aiprod_ds.report.summary import DataSummary, RunSummary

REPORT_FORMAT = 1


def write_report(folder: Path, summary: RunSummary) -> tuple[Path, Path]:
    """Writes `report.json` and `report.md` into the run folder.

    Returns:
        The paths of the two files.
    """
    json_path, page_path = folder / "report.json", folder / "report.md"
    write_atomically(json_path, json.dumps(report_dict(summary), indent=2, allow_nan=False) + "\n")
    write_atomically(page_path, render_report(summary))
    return json_path, page_path


def write_start(folder: Path, known: Mapping[str, Any], data: DataSummary) -> Path:
    """Writes `start.json` into the run folder, with the names and forms of report.json, and returns its
    path."""
    path = folder / "start.json"
    values = _json_ready({**known, "data": _data_dict(data)})
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
    return path


def report_dict(summary: RunSummary) -> dict[str, Any]:
    """Returns the contents of report.json: the fields of `RunSummary`, with versions on top; NaN and infinity
    as strings."""
    values = asdict(summary)
    values["format"] = REPORT_FORMAT
    values["status"] = summary.status.value
    values["versions"] = dict(summary.environment.get("versions", {}))
    values["data"] = _data_dict(summary.data)
    encoded = _json_ready(values)
    assert isinstance(encoded, dict)
    return encoded


def _data_dict(data: DataSummary) -> dict[str, Any]:
    values = asdict(data)
    for kind in ("unreadable", "too_short", "replaced"):
        values[kind] = [{"path": path, "reason": reason} for path, reason in getattr(data, kind)]
    return values


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
