"""Evaluations of runs that have no evaluations.jsonl: from the rows of their measures and the names of the
files in samples/."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiprod_ds.metrics.evaluations import EvaluationRecord, Kind, Medium, Role
from aiprod_ds.metrics.jsonl import MetricRow

_FILE = re.compile(
    r"(?P<when>before|original|phase_(?P<number>\d+)_.*?)(?:_clip_(?P<clip>\d+))?\.(?P<suffix>png|wav|mp4)"
)
_KINDS: dict[str, Kind] = {"png": "picture", "wav": "sound", "mp4": "film"}


def evaluations_of_rows(
    folder: Path, rows: Sequence[MetricRow], plan: Sequence[Mapping[str, Any]]
) -> tuple[EvaluationRecord, ...]:
    """Returns one record for every row of measures, with the files that its name says it wrote.

    Args:
        rows: Those with `evaluation/` metrics alone, in order: one before training, one after each phase.
        plan: Rows of plan.json, for the names of phases.
    """
    names = {int(row["phase"]): str(row["name"]) for row in plan if {"phase", "name"} <= row.keys()}
    media = _media(folder)
    records: list[EvaluationRecord] = []
    for update, metrics in rows:
        number = 0 if update == 0 else len([record for record in records if record.update > 0]) + 1
        is_before = number == 0
        shown = [*media.get("original", []), *media.get("before" if is_before else f"phase_{number}", [])]
        records.append(
            EvaluationRecord(
                update=update,
                samples=0,
                phase=names.get(max(number - 1, 0), ""),
                phase_index=max(number - 1, 0),
                reason="before" if is_before else "phase_end",
                seconds=0.0,
                metrics={name.removeprefix("evaluation/"): value for name, value in metrics.items()},
                media=tuple(shown),
            )
        )
    return tuple(records)


def _media(folder: Path) -> dict[str, list[Medium]]:
    found: dict[str, list[Medium]] = {}
    for when, medium in sorted(_named(folder), key=lambda entry: (entry[1].clip or 0, entry[1].path)):
        found.setdefault(when, []).append(medium)
    return found


def _named(folder: Path) -> Iterator[tuple[str, Medium]]:
    has_originals = any((folder / "samples").glob("original_clip_*"))
    for path in (folder / "samples").glob("*"):
        match = _FILE.fullmatch(path.name)
        if match is None:
            continue
        clip = None if match["clip"] is None else int(match["clip"])
        when = match["when"] if match["number"] is None else f"phase_{match['number']}"
        role: Role = "reconstruction" if has_originals else "preview"
        if match["when"] == "original":
            role = "original"
        elif clip is None:
            role = "sheet"
        yield (
            when,
            Medium(
                path=f"samples/{path.name}", kind=_KINDS[match["suffix"]], role=role, caption="", clip=clip
            ),
        )
