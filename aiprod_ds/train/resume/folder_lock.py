"""One run at a time in a run folder: a lock of all its ranks on the file `.lock`, which ends with them,
however they end.

Owns that file. A rank that outlives its launcher, or has not noticed yet that another rank was killed, still
writes; beside it a new start would commit a checkpoint of two runs' chunks. The lock is a POSIX record lock:
the kernel drops it with the process, loader workers do not inherit it, and network file systems with a lock
service carry it between hosts.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from aiprod_ds.errors import CheckpointError

LOCK = ".lock"
_RECENT_SECONDS = 600.0
_LOG = logging.getLogger(__name__)
_WITHIN_SECONDS = 90.0  # a rank takes up to 60 to find out that another is gone
_HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)


def is_in_use(folder: Path) -> bool:
    """Returns whether a process of a run holds the folder's lock; changes nothing.

    Never for a process that holds it: the kernel drops a lock when any descriptor of its file is closed. A
    folder whose lock may only be read counts as in use if metrics were written within ten minutes.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except PermissionError:
        return _is_fresh(folder / "metrics.jsonl")
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD_BY_OTHERS
    finally:
        os.close(descriptor)
    return False


def _is_fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _RECENT_SECONDS
    except OSError:
        return False


class FolderLock:
    """The lock of one process on one folder; a context that releases it.

    Where the file system has no locks it warns and holds nothing.

    Args:
        folder: Of a run; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Returns itself, holding nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets another run begin, once all ranks have come here."""
        self._release()

    def take_if_used(self, *, within_seconds: float = _WITHIN_SECONDS) -> None:
        """Takes the lock if a run has been in the folder; creates nothing. Rank 0 only.

        Raises:
            CheckpointError: As `take`.
        """
        if self._path.exists():
            self.take(within_seconds=within_seconds)

    def take(self, *, within_seconds: float = _WITHIN_SECONDS) -> None:
        """Takes the lock once no process of another run holds it, and then lets the other ranks `share` it.
        Rank 0 only.

        Args:
            within_seconds: How long to wait for what is left of another run.

        Raises:
            CheckpointError: If another run is still there then; names its rank 0.
        """
        deadline = time.monotonic() + within_seconds
        is_told = False
        while not self._lock(fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"{self._folder}: must have one run at a time, got another, whose rank 0 is or was "
                    f"{self._holder()}. "
                    "End all of its processes, or name another --output-dir."
                )
            if not is_told:
                _LOG.warning(
                    "folder_in_use folder=%s rank_0=%s waiting_seconds=%g",
                    self._folder,
                    self._holder(),
                    within_seconds,
                )
                is_told = True
            time.sleep(0.2)
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH)

    def share(self) -> None:
        """Holds the lock beside rank 0, which has it. Every other rank."""
        self._lock(fcntl.LOCK_SH)

    def _lock(self, kind: int) -> bool:
        """Returns whether nobody else's lock forbids this one."""
        self._release()  # closing the file later would drop the new lock with the old one
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD_BY_OTHERS:
                return False
            _LOG.warning("folder_not_locked folder=%s reason=%s", self._folder, error)
            return True
        self._descriptor = descriptor
        return True

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8").strip()[:200] or "unknown"
        except OSError:
            return "unknown"
