"""What every destination of metrics and media offers, and the guard around those that may fail.

JSON lines are the truth and their errors are raised. Mirrors (TensorBoard, Weights & Biases) stand behind
`MirrorSink`: their first failure is logged once and ends them, never the training. The recorder calls sinks
on the main rank only.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
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


_MAX_WAITING = 10_000


class OwnThreadSink:
    """A sink that works in a thread of its own, so that nobody waits for one that hangs.

    Args:
        sink: Raises nothing: a `MirrorSink`.
        name: What warnings call it.
        close_seconds: Longest wait for it at the end.
        on_abandoned: Called if it has not ended by then; must not wait.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        name: str,
        close_seconds: float,
        on_abandoned: Callable[[], None] = lambda: None,
    ) -> None:
        self._sink = sink
        self._name = name
        self._close_seconds = close_seconds
        self._on_abandoned = on_abandoned
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_WAITING)
        # A daemon: the process may end while a call hangs.
        self._thread = threading.Thread(target=self._work, name=f"{name}-mirror", daemon=True)
        self._thread.start()
        self._is_open = True

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics to the thread."""
        self._put(lambda: self._sink.log(update, metrics))

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        """Hands the evaluation to the thread."""
        self._put(lambda: self._sink.log_evaluation(record, folder))

    def close(self) -> None:
        """Lets the thread finish what waits and close the destination, within `close_seconds`."""
        if not self._put(None):
            return
        self._is_open = False
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._abandon(f"did not end within {self._close_seconds:.0f} s")

    def _put(self, call: Callable[[], None] | None) -> bool:
        """Returns whether the thread will come to it."""
        if not self._is_open:
            return False
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._is_open = False
            self._abandon(f"has not taken {_MAX_WAITING} rows")
        return self._is_open

    def _abandon(self, reason: str) -> None:
        _log.warning("mirror=%s abandoned: %s; metrics.jsonl still holds everything", self._name, reason)
        self._on_abandoned()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
        self._sink.close()
