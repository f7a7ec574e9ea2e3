"""Which pictures, films and sounds of evaluations inside phases a run folder keeps.

Owns their deletion. Records stay whatever goes; evaluations before training and at the ends of phases keep
their media. Called when an evaluation was written and when a run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aiprod_ds.metrics.evaluations import FILE, EvaluationRecord, keep_evaluations, read_evaluations

_LOG = logging.getLogger(__name__)
_SHARED = ("original",)  # one file for all evaluations


def thin_media(folder: Path, *, keep: int) -> None:
    """Deletes media until at most `keep` evaluations inside phases have some, evenly spread over the run.

    Args:
        folder: The run folder.
        keep: At least 1; the newest counts.
    """
    records = read_evaluations(folder)
    inside = [index for index, record in enumerate(records) if _is_inside(record)]
    numbers = kept_numbers(len(inside), keep)
    gone = {index for number, index in enumerate(inside) if number not in numbers and records[index].media}
    if not gone:
        return
    thinned = [
        replace(record, media=(), thinned=len(record.media)) if index in gone else record
        for index, record in enumerate(records)
    ]
    keep_evaluations(folder, thinned)  # first: a file that nobody names does no harm
    _delete(folder, [records[index] for index in gone], thinned)


def kept_numbers(count: int, keep: int) -> set[int]:
    """Returns which of `count` evaluations, numbered from 0, keep their media: multiples of the least power
    of two that leaves room, and the last.

    What is kept of more is kept of fewer too, so a later call never wants back what an earlier one gave up.
    Worked example: of 11 with `keep=4` 0, 4, 8 and 10.
    """
    step = 1
    while count and len({*range(0, count, step), count - 1}) > keep and step < count:
        step *= 2
    return {*range(0, count, step), count - 1} if keep > 1 else {count - 1}


def drop_later_evaluations(folder: Path, *, count: int, last_update: int | None = None) -> None:
    """Leaves the records which the checkpoint knows that a run goes on from, and deletes what the others
    show.

    Args:
        folder: The run folder.
        count: The most that are left; fewer where the disk did not take one, or a damaged line was deleted.
        last_update: Of the last evaluation that the checkpoint knows; None if it does not say.

    Raises:
        DataError: If the file is damaged.
        OSError: If it cannot be written.
    """
    if not (folder / FILE).exists():
        return
    records = read_evaluations(folder)
    kept = [record for record in records[:count] if last_update is None or record.update <= last_update]
    keep_evaluations(folder, kept)  # also without a line that a kill cut short
    _delete(folder, records[len(kept) :], kept)


def _is_inside(record: EvaluationRecord) -> bool:
    """Whether it is one of a phase's own, and showed something."""
    return record.reason in {"interval", "asked"} and bool(record.media or record.thinned)


def _delete(folder: Path, gone: Sequence[EvaluationRecord], kept: Sequence[EvaluationRecord]) -> None:
    used = {medium.path for record in kept for medium in record.media}
    for medium in (medium for record in gone for medium in record.media):
        if medium.path in used or medium.role in _SHARED:
            continue
        try:
            (folder / medium.path).unlink(missing_ok=True)
        except OSError as error:  # a run does not end for a picture that is too many
            _LOG.warning("medium_not_deleted path=%s error=%s", medium.path, error)
