"""metrics.jsonl: one JSON object per update, the truth that all other sinks mirror.

A line is written at once, so a killed run loses at most the line it was writing; while the disk takes nothing
lines wait in memory. A resumed run first drops what the lost run wrote beyond the checkpoint, so that every
update stands in the file exactly once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from aiprod_ds.appended_file import AppendedFile
from aiprod_ds.bad_disk import DiskWatch
from aiprod_ds.errors import DataError
from aiprod_ds.files import write_atomically
from aiprod_ds.metrics.evaluations import EvaluationRecord

MetricRow = tuple[int, dict[str, float]]


class JsonlSink:
    """Appends `{"update": 12, "loss/total": 0.31, ...}` per update; NaN and infinity stand as "nan", "inf"
    and "-inf".

    Args:
        path: Its folder must exist.
        resume_from_update: Update count of the checkpoint that the run continues from; later lines are
            dropped. None starts a new file.
        evaluates_again: Whether the evaluation at just that update is still to come for the continued run; a
            line of it is dropped too.
        disk: Survives and counts lines that the disk does not take, which are written once it does; None: an
            `OSError` is raised.

    Raises:
        DataError: If the file to continue is damaged anywhere but in its last line.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_from_update: int | None = None,
        evaluates_again: bool = False,
        disk: DiskWatch | None = None,
    ) -> None:
        known = [] if resume_from_update is None or not path.exists() else _complete_lines(path)
        rows = [(_parse(line, f"{path}:{number}"), line) for number, line in enumerate(known, start=1)]
        last = resume_from_update or 0

        def is_kept(update: int, metrics: Mapping[str, float]) -> bool:
            return update < last or (update == last and not (evaluates_again and _is_evaluation(metrics)))

        write_atomically(path, "".join(line for row, line in rows if is_kept(*row)))
        self._name = path.name
        self._disk = disk
        self._file = AppendedFile(path)
        self._is_open = True

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and hands it to the operating system."""
        if not self._is_open:
            raise ValueError(f"metrics.jsonl: update {update} was logged after close().")
        record = {"update": update, **{name: _encode(value) for name, value in metrics.items()}}
        line = f"{json.dumps(record, allow_nan=False)}\n".encode()
        self._file.add(line)
        if self._disk is None:
            self._file.flush()
        else:
            self._disk.attempt(self._name, self._file.flush)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Does nothing: the row of its measures is written, and evaluations have a file of their own."""

    def close(self) -> None:
        """See `Sink.close`."""
        if not self._is_open:
            return
        self._is_open = False
        if self._disk is not None:
            if self._file.num_waiting:
                self._disk.attempt(self._name, self._file.flush)
            if lost := self._file.num_lost + self._file.num_waiting:
                self._disk.give_up(self._name, lost, "rows")
        self._file.close()


def read_metrics(path: Path) -> list[MetricRow]:
    """Returns (update, metrics) of every complete line, in order; a torn last line is left out.

    Raises:
        DataError: If a complete line is not what `JsonlSink` writes; names the line.
    """
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(_complete_lines(path), start=1)]


def _is_evaluation(metrics: Mapping[str, float]) -> bool:
    return all(name.startswith("evaluation/") for name in metrics)


def _complete_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return lines


def _parse(line: str, where: str) -> MetricRow:
    try:
        record = json.loads(line)
        return int(record.pop("update")), {str(name): float(value) for name, value in record.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: must be a JSON object with an update and numbers, got {line[:80]!r}. Remove the line "
            "or restore the file."
        ) from error


def _encode(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
