"""Keeps report.html up to date while a run goes on: written anew at its first update and at every
evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from aiprod_ds.bad_disk import DiskWatch
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.report.page.run_page import PAGE, write_page

_AGAIN_SECONDS = 60.0


class PageSink:
    """A sink that reads what the run folder has by then, not what it is given.

    Args:
        folder: The run folder.
        disk: Survives and counts pages that the disk does not take, which are tried again at the next
            evaluation, or with a row a minute later; None: an `OSError` is raised.
    """

    def __init__(self, folder: Path, *, disk: DiskWatch | None = None) -> None:
        self._folder = folder
        self._disk = disk
        self._due_at: float | None = 0.0

    def log(self, update: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 the folder has them
        """Writes the page at the first row, so that it does not wait for an evaluation."""
        if self._due_at is not None and time.monotonic() >= self._due_at:
            self._write()

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:  # noqa: ARG002 likewise
        """Writes the page; the record stands in evaluations.jsonl by now."""
        self._write()

    def close(self) -> None:
        """See `Sink.close`: the end of a run writes its page once it has written its report."""

    def _write(self) -> None:
        self._due_at = None
        if self._disk is None:
            write_page(self._folder, is_running=True)
            return
        self._disk.attempt(PAGE, lambda: write_page(self._folder, is_running=True))
        if self._disk.is_out(PAGE):
            self._due_at = time.monotonic() + _AGAIN_SECONDS
