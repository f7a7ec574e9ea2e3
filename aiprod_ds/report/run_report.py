"""The result of a run as files: report.json for programs, report.md for people.

Owns how a `RunSummary` becomes JSON; the page is laid out in `report_view`. Both files are replaced as a
whole, so a reader never sees half a report.
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
from aiprod_ds.report.summary import RunSummary

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


def report_dict(summary: RunSummary) -> dict[str, Any]:
    """Returns the contents of report.json: the fields of `RunSummary`, with versions on top; NaN and infinity
    as strings."""
    values = asdict(summary)
    values["format"] = REPORT_FORMAT
    values["status"] = summary.status.value
    values["versions"] = dict(summary.environment.get("versions", {}))
    for kind in ("unreadable", "too_short"):
        values["data"][kind] = [
            {"path": path, "reason": reason} for path, reason in getattr(summary.data, kind)
        ]
    encoded = _json_ready(values)
    assert isinstance(encoded, dict)
    return encoded


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
