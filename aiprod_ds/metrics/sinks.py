"""What every destination of metrics and media offers, and the guard around those that may fail.

JSON lines are the truth and their errors are raised. Mirrors (TensorBoard, Weights & Biases) stand behind
`MirrorSink`: their first failure is logged once and ends them, never the training. The recorder calls sinks
on the main rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from aiprod_ds.metrics.evaluations import EvaluationRecord

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the metrics of one update after another, and evaluations among them, in order."""

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of `update`, already reduced over ranks."""

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Takes what an evaluation has to show; its measures came through `log` just before.

        Args:
            record: Names the media.
            folder: The run folder, which the paths of the media are relative to. A file may be missing.
        """

    def close(self) -> None:
        """Writes what is pending and lets go of files and connections. Idempotent."""


class MirrorSink:
    """A sink whose failure costs one warning and nothing else.

    Args:
        sink: After its first failure it is neither called nor closed.
        name: What the warning calls it.
    """

    def __init__(self, sink: Sink, *, name: str) -> None:
        self._sink: Sink | None = sink
        self._name = name
        self._takes_media = True

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Passes the metrics on, unless this mirror has failed before."""
        if self._sink is None:
            return
        try:
            self._sink.log(update, metrics)
        except Exception as error:  # noqa: BLE001 whatever a logging service raises, training goes on
            self._give_up(f"update={update}", error)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Passes the evaluation on.

        After a failure here the mirror goes on with metrics alone: a film that it cannot take says nothing of
        numbers.
        """
        if self._sink is None or not self._takes_media:
            return
        try:
            self._sink.log_evaluation(record, folder)
        except Exception as error:  # noqa: BLE001 whatever a logging service raises, training goes on
            self._takes_media = False
            _log.warning(
                "mirror=%s update=%d media disabled after error=%r; samples/ still holds everything",
                self._name,
                record.update,
                error,
            )

    def close(self) -> None:
        """Closes the destination, once."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close()
        except Exception as error:  # noqa: BLE001 whatever a logging service raises, training goes on
            self._give_up("close", error)

    def _give_up(self, where: str, error: Exception) -> None:
        self._sink = None
        _log.warning(
            "mirror=%s %s disabled after error=%r; metrics.jsonl still holds everything",
            self._name,
            where,
            error,
        )
