"""What every destination of metrics offers, and the guard around those that may fail.

JSON lines are the truth and their errors are raised. Mirrors (TensorBoard, Weights & Biases) stand behind
`MirrorSink`: their first failure is logged once and ends them, never the training. The recorder calls sinks
on the main rank only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the metrics of one update after another, in order."""

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of `update`, already reduced over ranks."""

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

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Passes the metrics on, unless this mirror has failed before."""
        if self._sink is None:
            return
        try:
            self._sink.log(update, metrics)
        except Exception as error:  # noqa: BLE001 whatever a logging service raises, training goes on
            self._give_up(f"update={update}", error)

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
