"""The form of a benchmark's result: rows of figures with their runs, and what they were measured on.

`tools/performance_tables.py` makes the tables of docs/performance.md from these files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from aiprod_ds.report.environment import describe_environment


def figure(
    case: str, metric: str, unit: str, runs: Sequence[float], *, goal: float | None = None
) -> dict[str, Any]:
    """Returns one row: the median of `runs` and their spread; a single run has no spread."""
    spread = max(runs) - min(runs) if len(runs) > 1 else None
    kept = list(runs) if len(runs) > 1 else []
    value = statistics.median(runs)
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "spread": spread,
        "runs": kept,
        "goal": goal,
    }


def write_result(path: Path, name: str, rows: Sequence[dict[str, Any]], *, is_told: bool = True) -> None:
    """Writes the result file of benchmark `name` and, if `is_told`, prints its rows."""
    environment = describe_environment()
    result = {
        "name": name,
        "date": date.today().isoformat(),
        **{key: environment[key] for key in ("hardware", "versions", "command")},
        "commit": (environment["git"] or {}).get("commit"),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    for row in rows if is_told else ():
        print(f"{row['case']}: {row['metric']} {row['value']:.4g} {row['unit']}")
