"""Writes the tables of docs/performance.md from benchmarks/results/*.json; `--check` only compares.

    python tools/performance_tables.py [--check]

Of every benchmark the newest result is shown. What was asked and what the figures do not show are the first
line and the paragraph with "does not show" of the docstring of `benchmarks/<name>.py`. Everything outside the
two marker lines of the page is written by hand and stays.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from aiprod_ds.crash import guarded

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tools/performance_tables.py: begin -->\n", "<!-- tools/performance_tables.py: end -->\n"
_SHOWN_VERSIONS = ("python", "torch", "deepspeed", "diffusers")


def main() -> int:
    """Writes or checks the page; returns 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Tables of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + tables(ROOT / "benchmarks") + END + after
    if not arguments.check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        print(
            f"{PAGE}: must hold the newest results, got other text. Run: python tools/performance_tables.py",
            file=sys.stderr,
        )
        return 1
    return 0


def tables(folder: Path) -> str:
    """Returns a section for every benchmark in `folder` that has a result, by name.

    Raises:
        ValueError: If a benchmark does not say what it does not show.
    """
    newest: dict[str, dict[str, Any]] = {}
    for path in (folder / "results").glob("*.json"):
        result = {**json.loads(path.read_text(encoding="utf-8")), "file": path.name}
        known = newest.get(result["name"])
        if known is None or (known["date"], known["file"]) < (result["date"], result["file"]):
            newest[result["name"]] = result
    return "\n".join(_section(newest[name], folder / f"{name}.py") for name in sorted(newest))


def _section(result: dict[str, Any], script: Path) -> str:
    question, limits = _question_and_limits(script)
    hardware, versions = result["hardware"], result["versions"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores, no GPU"
    software = ", ".join(f"{name} {versions[name]}" for name in _SHOWN_VERSIONS if name in versions)
    return "\n".join(
        [
            f"### {script.stem}",
            "",
            question,
            "",
            _table(result["rows"]),
            "",
            f"- Measured {result['date']} on {machine}; {software}.",
            (
                f"- Commit `{result['commit'][:12]}`, `{result['command']}`, [all "
                f"figures](../benchmarks/results/{result['file']})."
            ),
            f"- {limits}",
            "",
        ]
    )


def _question_and_limits(script: Path) -> tuple[str, str]:
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    limits = next((paragraph for paragraph in paragraphs if "does not show" in paragraph), None)
    if limits is None:
        raise ValueError(
            f"{script}: docstring must have a paragraph with 'does not show', got none. Say what the "
            "figures hide."
        )
    return paragraphs[0], limits


def _table(rows: list[dict[str, Any]]) -> str:
    has_peer = any(row.get("peer") for row in rows)
    header = [
        "case",
        "metric",
        "value",
        "runs",
        "largest minus smallest",
        "goal",
        *(["compared with"] if has_peer else []),
    ]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [
            row["case"],
            row["metric"],
            _value(row["value"], row["unit"]),
            str(len(row["runs"] or ()) or "-"),
        ]
        cells += [_value(row["spread"], row["unit"]), _value(row["goal"], row["unit"])]
        lines.append(
            cells
            + (
                [f"{row['peer']}: {_value(row['peer_value'], row['unit'])}" if row.get("peer") else "-"]
                * has_peer
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g} {unit}"


if __name__ == "__main__":
    sys.exit(guarded(main, program="tools/performance_tables.py"))
