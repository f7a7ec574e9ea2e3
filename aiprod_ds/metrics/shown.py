"""What trackers show of an evaluation: which media under which names, captions, and the table of measures.

Owns nothing of a tracker; Weights & Biases and TensorBoard name the same things the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aiprod_ds.metrics.evaluations import EvaluationRecord, Medium, read_evaluations

TABLE = "evaluations"
"""Name of the table of measures."""


def named_media(record: EvaluationRecord, folder: Path) -> dict[str, Medium]:
    """Returns name -> medium of every file that is there, in the order of the record.

    A name is the same at every evaluation, so that a tracker can show one clip over time: `samples/sheet`,
    `samples/reconstruction_2`; what is a picture, a film and a sound of one clip is told apart by its kind.
    """
    found: dict[str, Medium] = {}
    for medium in record.media:
        if not (folder / medium.path).is_file():
            continue
        name = f"samples/{medium.role}" + ("" if medium.clip is None else f"_{medium.clip}")
        number, unique = 2, name if name not in found else f"{name}_{medium.kind}"
        while unique in found:
            unique, number = f"{name}_{medium.kind}_{number}", number + 1
        found[unique] = medium
    return found


def caption_of(medium: Medium) -> str:
    """Returns what stands under a medium: its caption, and the prompt or the file it is of."""
    more = [text for text in (medium.prompt, medium.source) if text and text not in medium.caption]
    return " | ".join([medium.caption, *more])


def evaluations_so_far(record: EvaluationRecord, folder: Path) -> tuple[EvaluationRecord, ...]:
    """Returns the evaluations of the run up to `record`, which may not be in the file yet."""
    earlier = [
        one
        for one in read_evaluations(folder)
        if one.update <= record.update and (one.update, one.reason) != (record.update, record.reason)
    ]
    return (*earlier, record)


def measures_table(records: Sequence[EvaluationRecord]) -> tuple[list[str], list[list[str | float | None]]]:
    """Returns the columns and one row per evaluation; None where a measure was not taken."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    rows: list[list[str | float | None]] = [
        [
            record.update,
            record.samples,
            record.phase,
            record.reason,
            *(record.metrics.get(name) for name in names),
            round(record.seconds, 1),
            len(record.clips),
            "; ".join(f"{out.clip}: {out.measure} ({out.reason})" for out in record.not_judged),
        ]
        for record in records
    ]
    return ["update", "samples", "phase", "reason", *names, "seconds", "clips", "not judged"], rows
