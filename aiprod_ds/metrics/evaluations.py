"""What evaluations found, one line of `evaluations.jsonl` each: measures, what they were measured on, and the
files that show it.

Owns the record and its file. The loop writes a record when an evaluation ends; the page, the trackers and the
choice of the best checkpoint read it, so that what they say can be made again from the run folder alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from aiprod_ds.appended_file import AppendedFile
from aiprod_ds.errors import DataError
from aiprod_ds.files import write_lines_atomically

FILE = "evaluations.jsonl"
EVERY_MEASURE = "every measure"

Reason = Literal["before", "interval", "asked", "phase_end"]
"""Why an evaluation was made: before training, by its interval, by a file EVALUATE, at the end of a phase."""
Kind = Literal["picture", "film", "sound"]
Role = Literal["sheet", "original", "reconstruction", "preview", "spectrogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """A file that shows something of an evaluation.

    Attributes:
        path: Relative to the run folder, with forward slashes.
        role: What it shows; a `sheet` is a picture of all clips at once.
        clip: Its number among those that are shown, from 1; the original and the reconstruction of a clip
            have the same. None for a sheet.
        source: Name of the file that an original was read from.
        prompt: Of a preview.
    """

    path: str
    kind: Kind
    role: Role
    caption: str
    clip: int | None = None
    source: str = ""
    prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotJudged:
    """A held-out clip that a measure cannot say anything about, and that is therefore not in its mean.

    Attributes:
        clip: Name of its file.
        measure: Without the `evaluation/` prefix; `EVERY_MEASURE` of a clip that is not among the measured
            ones.
        reason: In words, e.g. `digital silence`.
    """

    clip: str
    measure: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation.

    Attributes:
        update: Applied updates of the run.
        samples: Clips trained on by then.
        phase: Name of the phase; the first one's before training.
        seconds: Wall time it took.
        metrics: Measure -> value, without the `evaluation/` prefix; only what was measured.
        is_average: Whether the average of the weights was evaluated (EMA).
        clips: Names of the files that were measured, in order.
        thinned: How many media it had that were deleted, because the run keeps those of some evaluations.
    """

    update: int
    samples: int
    phase: str
    phase_index: int
    reason: Reason
    seconds: float
    metrics: Mapping[str, float]
    headline: str = ""
    is_average: bool = False
    clips: tuple[str, ...] = ()
    not_judged: tuple[NotJudged, ...] = ()
    media: tuple[Medium, ...] = field(default=())
    thinned: int = 0

    def num_judged(self, measure: str) -> int:
        """Returns of how many clips `measure` is the mean."""
        left_out = {entry.clip for entry in self.not_judged if entry.measure == measure}
        return sum(clip not in left_out for clip in self.clips)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record ready for JSON; a value that is not finite becomes null."""
        values = asdict(self)
        values["metrics"] = {
            name: value if math.isfinite(value) else None for name, value in self.metrics.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationRecord:
        """Returns the record that `to_dict` made; null is NaN again, keys of a later version are left out."""
        own = {item.name for item in fields(cls)}
        kept = {name: value for name, value in values.items() if name in own}
        kept["metrics"] = {
            name: math.nan if value is None else float(value) for name, value in kept["metrics"].items()
        }
        kept["clips"] = tuple(kept.get("clips", ()))
        kept["not_judged"] = tuple(NotJudged(**entry) for entry in kept.get("not_judged", ()))
        kept["media"] = tuple(Medium(**entry) for entry in kept.get("media", ()))
        return cls(**kept)


def append_evaluation(folder: Path, record: EvaluationRecord) -> None:
    """Adds `record` to the file in the run folder; what a kill cut short there goes first.

    Raises:
        OSError: If the disk does not take it; then it is not there.
    """
    file = AppendedFile(folder / FILE)
    try:
        file.append(line_of(record))
    finally:
        file.close()


def line_of(record: EvaluationRecord) -> bytes:
    """Returns the line of the file that says `record`."""
    return f"{json.dumps(record.to_dict(), allow_nan=False)}\n".encode()


def read_evaluations(folder: Path) -> tuple[EvaluationRecord, ...]:
    """Returns what the run folder has, in order; empty without a file. A last line that a kill cut short is
    left out.

    Raises:
        DataError: If another line is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found.append(EvaluationRecord.from_dict(cast("Mapping[str, Any]", json.loads(line))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):  # without its line feed
                break
            raise DataError(
                f"{path}:{number}: must be an evaluation's record, got {line[:80]!r}. Delete this line, "
                "which loses that evaluation's record alone, or restore the file, and start again."
            ) from error
    return tuple(found)


def keep_evaluations(folder: Path, records: Iterable[EvaluationRecord]) -> None:
    """Replaces the file by `records`; a run that goes on from a checkpoint drops what came after it."""
    write_lines_atomically(folder / FILE, map(line_of, records))
