"""A file that grows by whole records, whatever the disk does.

Owns what waits while the disk takes nothing, and the repair of a record that was cut in its middle. That a
write failed is for the caller to judge, mostly by `bad_disk.DiskWatch`.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path

WAITING_BYTES = 64 << 20
"""The most that waits in memory for a disk that takes nothing: some 40,000 updates of metrics."""
_BLOCK_BYTES = 1 << 16


class AppendedFile:
    """Appends records; those that the disk does not take wait, in order, and go first at the next call.

    The file is opened anew after an error, and where another file, or none, has come to its name. A record
    that was written in part is cut off before anything else is written.

    Args:
        path: In a folder that exists; never made here, so that nothing is written beside a mount that is
            gone.
        ends_with: What each record ends with, so that one that another process left unfinished is found too;
            empty: what the file held before is left as it is.
        limit_bytes: Of what waits; beyond them the oldest are given up.

    Attributes:
        num_lost: Records that were given up.
    """

    def __init__(self, path: Path, *, ends_with: bytes = b"\n", limit_bytes: int = WAITING_BYTES) -> None:
        self.num_lost = 0
        self._path = path
        self._ends_with = ends_with
        self._limit_bytes = limit_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._descriptor: int | None = None
        self._size: int | None = None  # up to the end of the last record that is whole

    @property
    def num_waiting(self) -> int:
        """How many records the disk has not taken."""
        return len(self._waiting)

    def append(self, record: bytes) -> None:
        """Adds a record and writes it.

        Raises:
            OSError: If the disk does not take it; then it waits.
        """
        self.add(record)
        self.flush()

    def add(self, record: bytes) -> None:
        """Lets a record wait for `flush`."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > self._limit_bytes and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.num_lost += 1

    def flush(self) -> None:
        """Hands what waits to the operating system.

        Raises:
            OSError: If the disk does not take all of it; what it has not taken waits.
        """
        if not self._waiting:
            return
        num_written = 0
        try:
            descriptor = self._opened()
            for record in self._waiting:
                _write(descriptor, record)
                self._size = (self._size or 0) + len(record)
                num_written += 1
        except OSError:
            if self._descriptor is not None and self._size is not None:
                with suppress(OSError):  # else before the next record
                    os.ftruncate(self._descriptor, self._size)
            self.close()
            raise
        finally:
            self._waiting_bytes -= sum(map(len, islice(self._waiting, num_written)))
            for _ in range(num_written):
                self._waiting.popleft()

    def close(self) -> None:
        """Lets go of the file; what waits stays. Idempotent, and `append` opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _opened(self) -> int:
        """Returns a descriptor of the file that has the name now, at the end of its last whole record."""
        if self._descriptor is not None:
            if _is_named(self._descriptor, self._path):
                return self._descriptor
            self.close()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = descriptor = os.open(self._path, flags, 0o666)
        size = os.fstat(descriptor).st_size
        if self._ends_with:
            whole = _whole_bytes(descriptor, size, self._ends_with)
        else:
            whole = size if self._size is None else min(size, self._size)
        if whole < size:
            os.ftruncate(descriptor, whole)
        self._size = whole
        return descriptor


def _write(descriptor: int, record: bytes) -> None:
    left = memoryview(record)
    while left:
        left = left[os.write(descriptor, left) :]


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # noqa: PTH116  once a row of metrics
    except FileNotFoundError:
        return False


def _whole_bytes(descriptor: int, size: int, end: bytes) -> int:
    """Returns how many bytes of the file there are up to its last `end`, that included."""
    block_end = size
    while block_end > 0:
        start = max(0, block_end - _BLOCK_BYTES)
        found = os.pread(descriptor, block_end - start, start).rfind(end)
        if found >= 0:
            return start + found + len(end)
        block_end = start
    return 0
