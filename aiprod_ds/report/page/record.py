"""What a run folder holds, read as far as it can be: of a run that goes on, has ended, or was killed.

A damaged or missing file costs what it held and is told as a problem; a folder in which nothing is a run's
is refused. The time to read is bounded: of a long run's metrics a sample of the lines is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from aiprod_ds.errors import AiprodError, DataError
from aiprod_ds.metrics.evaluations import FILE as EVALUATIONS
from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium
from aiprod_ds.metrics.jsonl import MetricRow
from aiprod_ds.report.page.older_runs import evaluations_of_rows
from aiprod_ds.strict_yaml import read_yaml

# Of start.json, report.json, an environment and a row of plan.json.
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("status", "model", "engine", "precision", "command", "platform", "name"), str),
    **dict.fromkeys(("updates", "planned_updates", "skipped_updates", "parameters", "world_size"), int),
    **dict.fromkeys(("peak_rss_bytes", "ranks", "hosts", "phase", "max_updates", "min_updates"), int),
    **dict.fromkeys(("height", "width", "frames", "global_batch_size"), int),
    **dict.fromkeys(("pixels_per_update", "learning_rate_max"), (int, float)),
    **dict.fromkeys(("phases", "replacements", "not_saved", "not_written", "performance"), list),
    **dict.fromkeys(("resharded", "accepted_data", "rollbacks", "rate_factors"), list),
    **dict.fromkeys(("data", "time_seconds", "versions", "hardware", "git"), dict),
}
_OF_A_RUN = ("config.yaml", "plan.json", "metrics.jsonl", "report.json", EVALUATIONS)
_MAX_BYTES_WHOLE = 24 << 20
_SAMPLED_ROWS, _LAST_BYTES = 12_000, 1 << 20
_LARGEST = 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run, as its folder tells it.

    Attributes:
        config: As the run goes on or ended with; empty if it cannot be read.
        earlier_configs: Those of earlier starts that differ: the update until which each was in force, oldest
            first.
        plan: Rows of plan.json.
        starts: Of the first start and of every resume: its update, and versions, hardware, command.
        started: What start.json has: what is known before the first update; empty of runs of older versions.
        rows: Of metrics.jsonl without those of evaluations, a sample of them if there are very many.
        report: What report.json has; None if the run did not come to write it.
        is_running: As the caller knows or has found.
        as_of: When this was read.
        last_write: When the run last wrote metrics; None if it never did.
        problems: What could not be read, in words.
    """

    folder: Path
    config: Mapping[str, Any]
    earlier_configs: tuple[tuple[int, Mapping[str, Any]], ...]
    plan: tuple[Mapping[str, Any], ...]
    starts: tuple[tuple[int, Mapping[str, Any]], ...]
    started: Mapping[str, Any]
    rows: tuple[MetricRow, ...]
    evaluations: tuple[EvaluationRecord, ...]
    report: Mapping[str, Any] | None
    is_running: bool
    as_of: datetime
    last_write: datetime | None
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the newest start."""
        return self.starts[-1][1] if self.starts else {}

    @property
    def updates(self) -> int:
        """The newest update that any file tells of."""
        told = [self.rows[-1][0]] if self.rows else []
        told += [record.update for record in self.evaluations]
        updates = None if self.report is None else self.report.get("updates")
        return max([*told, updates if isinstance(updates, int) else 0])


def read_run(folder: Path, *, is_running: bool = False) -> RunRecord:
    """Returns what the folder tells of its run.

    Raises:
        DataError: If it is no folder, or no file in it is a run's.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: must be a run folder, got no folder. Name what was --output-dir.")
    if not any((folder / name).is_file() for name in _OF_A_RUN):
        raise DataError(
            f"{folder}: must be a run folder, got none of {', '.join(_OF_A_RUN)} in it. Name what was "
            "--output-dir."
        )
    problems: list[str] = []
    rows, of_evaluations = _read_rows(folder / "metrics.jsonl", problems)
    plan = _read(folder / "plan.json", _mappings, problems, default=())
    evaluations = _read_evaluations(folder / EVALUATIONS, problems)
    if not evaluations:
        evaluations = evaluations_of_rows(folder, of_evaluations, plan)
    report = _read(folder / "report.json", _mapping, problems, default=None)
    metrics = folder / "metrics.jsonl"
    return RunRecord(
        folder=folder,
        config=_read(folder / "config.yaml", _yaml, problems, default={}),
        earlier_configs=_numbered(folder, "config_before_*.yaml", _yaml, problems),
        plan=plan,
        starts=(
            *((0, found) for found in [_read(folder / "environment.json", _mapping, problems, default={})]),
            *_numbered(folder, "environment_from_*.json", _mapping, problems),
        ),
        started=_read(folder / "start.json", _mapping, problems, default={}),
        rows=tuple(rows),
        evaluations=evaluations,
        report=report,
        is_running=is_running and report is None,
        as_of=datetime.now(timezone.utc),
        last_write=datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc)
        if metrics.is_file()
        else None,
        problems=tuple(problems),
    )


def _typed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what has the type that the page expects of it."""
    data = values.get("data")
    if isinstance(data, dict):
        values = {**values, "data": {key: value for key, value in data.items() if isinstance(value, list)}}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, _TYPES.get(key, object)) and not isinstance(value, bool)
    }


def _read(path: Path, parse: Callable[[bytes], Any], problems: list[str], *, default: Any) -> Any:
    """Returns what is in the file, or the default if it is not there or damaged, which is told."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError, TypeError, AiprodError, RecursionError) as error:
        reason = error.problems[0] if isinstance(error, AiprodError) and hasattr(error, "problems") else error
        problems.append(f"{path.name} cannot be read: {' '.join(str(reason).split())[:300]}")
        return default


def _mapping(data: bytes) -> Mapping[str, Any]:
    value = json.loads(data.decode("utf-8", "replace"))
    if not isinstance(value, dict):
        raise TypeError(f"must be an object, got {type(value).__name__}")
    return _typed(value)


def _mappings(data: bytes) -> tuple[Mapping[str, Any], ...]:
    value = json.loads(data.decode("utf-8", "replace"))
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise TypeError("must be a list of objects")
    return tuple(map(_typed, value))


def _yaml(data: bytes) -> Mapping[str, Any]:
    value = read_yaml(data, "configuration")
    if not isinstance(value, dict):
        raise TypeError("must be a mapping")
    return value


def _numbered(
    folder: Path, pattern: str, parse: Callable[[bytes], Mapping[str, Any]], problems: list[str]
) -> tuple[tuple[int, Mapping[str, Any]], ...]:
    """Returns the files of a pattern with the update in their names, in the order of updates."""
    found = []
    for path in folder.glob(pattern):
        number = path.stem.rpartition("_")[2]
        if number.isdigit():
            found.append((int(number), _read(path, parse, problems, default={})))
    return tuple(sorted(found, key=lambda entry: entry[0]))


def _read_evaluations(path: Path, problems: list[str]) -> tuple[EvaluationRecord, ...]:
    """Returns the records of all lines that are whole; how many others there are is told."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ()
    found, damaged = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(_sound(EvaluationRecord.from_dict(json.loads(line))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += number < len(lines)  # the last one may be torn by a kill
    if damaged:
        problems.append(f"{path.name}: {damaged} damaged lines are left out")
    return tuple(found)


def _sound(record: EvaluationRecord) -> EvaluationRecord:
    """Returns the record with the types that it promises, without media that have others.

    Raises:
        ValueError: If a number is none.
        TypeError: Likewise.
    """
    return replace(
        record,
        update=int(record.update),
        samples=int(record.samples),
        phase=str(record.phase),
        phase_index=int(record.phase_index),
        seconds=_bounded(float(record.seconds)),
        metrics={str(name): _bounded(value) for name, value in record.metrics.items()},
        clips=tuple(map(str, record.clips)),
        not_judged=tuple(
            entry
            for entry in record.not_judged
            if _are_texts(entry.clip, entry.measure, entry.reason) and entry.measure
        ),
        media=tuple(medium for medium in record.media if _is_sound(medium)),
    )


def _is_sound(medium: Medium) -> bool:
    texts = (medium.path, medium.kind, medium.role, medium.caption, medium.source, medium.prompt)
    return _are_texts(*texts) and (medium.clip is None or type(medium.clip) is int)


def _are_texts(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_rows(path: Path, problems: list[str]) -> tuple[list[MetricRow], list[MetricRow]]:
    """Returns the rows of updates and those of evaluations."""
    try:
        lines = _lines(path, problems)
    except OSError:
        return [], []
    updates: list[MetricRow] = []
    evaluations: list[MetricRow] = []
    damaged = 0
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            damaged += number < len(lines)  # the last one may be torn by a kill
        elif all(name.startswith("evaluation/") for name in row[1]):
            evaluations.append(row)
        else:
            updates.append(row)
    if damaged:
        problems.append(f"{path.name}: {damaged} damaged lines are left out")
    return sorted(updates, key=lambda row: row[0]), evaluations


def _row(line: bytes) -> MetricRow | None:
    try:
        record = json.loads(line)
        update = record.pop("update")
        if not math.isfinite(update):
            return None
        return int(update), {str(name): _bounded(float(value)) for name, value in record.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _bounded(value: float) -> float:
    """Returns the value, or infinity for one whose sums would overflow."""
    return value if abs(value) < _LARGEST or math.isnan(value) else math.copysign(math.inf, value)


def _lines(path: Path, problems: list[str]) -> Sequence[bytes]:
    """Returns all lines, or of a large file those at evenly spaced places and the last ones."""
    size = path.stat().st_size
    if size <= _MAX_BYTES_WHOLE:
        return [line for line in path.read_bytes().split(b"\n") if line]
    problems.append(
        f"{path.name} has {size / 2**20:,.0f} MiB: curves are drawn from {_SAMPLED_ROWS:,} of its lines and "
        "the last ones"
    )
    lines: list[bytes] = []
    with path.open("rb") as file:
        lines.append(file.readline().rstrip(b"\n"))
        for place in range(1, _SAMPLED_ROWS):
            file.seek((size - _LAST_BYTES) * place // _SAMPLED_ROWS)
            file.readline()
            lines.append(file.readline().rstrip(b"\n"))
        file.seek(size - _LAST_BYTES)
        file.readline()
        lines += file.read().split(b"\n")
    return [line for line in dict.fromkeys(lines) if line]
