"""Keeps report.html up to date while a run goes on: written anew at its first update and at every
evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.report.page.run_page import write_page


class PageSink:
    """A sink that reads what the run folder has by then, not what it is given.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_written = False

    def log(self, update: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 the folder has them
        """Writes the page at the first row, so that it does not wait for an evaluation."""
        if not self._is_written:
            self._write()

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:  # noqa: ARG002 likewise
        """Writes the page; the record stands in evaluations.jsonl by now."""
        self._write()

    def close(self) -> None:
        """See `Sink.close`: the end of a run writes its page once it has written its report."""

    def _write(self) -> None:
        self._is_written = True
        write_page(self._folder, is_running=True)
