"""TensorBoard's event file: one record for each event, appended from the thread of training.

Owns the file. tensorboard's own writer has a thread that ends with a traceback when the disk takes nothing,
and with it everything that comes later is lost; here it waits.
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from aiprod_ds.appended_file import AppendedFile
from aiprod_ds.bad_disk import DiskWatch

WHAT = "tensorboard"


class EventFile:
    """An event file of this process.

    Args:
        folder: Made if it is missing; its parent must exist.
        disk: Survives and counts what the disk does not take; None: an `OSError` is raised.
        purge_step: TensorBoard hides what other files of the folder say of this step and later ones; None:
            nothing.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: Path, *, disk: DiskWatch | None = None, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        # The form of the name, and that it grows with time, are what TensorBoard looks for: it reads files in
        # the order of their names, and two starts may be in one second.
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._disk = disk
        self._file = AppendedFile(folder / name, ends_with=b"")
        self._buffer = io.BytesIO()
        self._records = RecordWriter(self._buffer)
        self._is_open = True
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush()

    def add(self, summary: Any, update: int) -> None:
        """Adds a `Summary` of tensorboard's; `flush` writes it."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(wall_time=time.time(), step=update, summary=summary))

    def flush(self) -> None:
        """Hands what was added to the operating system."""
        record = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        self._file.add(record)
        if self._disk is None:
            self._file.flush()
        else:
            self._disk.attempt(WHAT, self._file.flush)

    def close(self) -> None:
        """Writes what is left. Idempotent."""
        if self._is_open:
            self._is_open = False
            self.flush()
            self._file.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
