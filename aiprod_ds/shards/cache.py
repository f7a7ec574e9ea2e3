"""Files of remote shards on a local disk, at most so many bytes: the ones used longest ago go first.

Owns the folder. Files are named by their hashes, so that a cache is never stale and may serve many runs,
ranks and loader workers at once: a file appears by rename, and who makes room holds a lock. Called by
`reader.py`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"
_PART = ".part"
_KEPT_SHARE = 0.9  # what making room leaves, so that it is not made for every file
_NUMBER_BYTES = 32
_log = logging.getLogger(__name__)


class ShardCache:
    """A folder of files by hash.

    Args:
        folder: Made when the first file is kept.
        limit_bytes: The most that the files may have together.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._is_broken = False

    def open(self, sha256: str) -> int | None:
        """Returns a descriptor of a file, which the caller closes; None if it is not there.

        What is open stays readable, whoever makes room.
        """
        path = self._path(sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            os.utime(path)
        except OSError as error:
            if error.errno != errno.ENOENT:  # a cache of another user is read without being marked
                _log.debug("cache entry is not marked as used: file=%s error=%s", path, error)
        return descriptor

    def keep(self, sha256: str, data: bytes) -> None:
        """Keeps a file; one that is larger than the whole cache is not kept.

        A disk that cannot be written costs the speed of a cache, not the run: the log tells it once.
        """
        if len(data) > self._limit_bytes or self._is_broken:
            return
        path = self._path(sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as lock:
                if path.exists():
                    return
                used = self._used(lock)
                if used + len(data) > self._limit_bytes:
                    used = self._make_room(self._limit_bytes * _KEPT_SHARE - len(data))
                _note(lock, used + len(data))  # before the file: what a kill leaves is counted too high
                _write(path, data)
        except OSError as error:
            self._is_broken = True
            _log.warning(
                "cache of shards cannot be written, everything is read from its storage: folder=%s error=%s",
                self._folder,
                error,
            )

    def drop(self, sha256: str) -> None:
        """Deletes a file."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256[2:]

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # with the lock

    def _used(self, lock: int) -> int:
        text = os.pread(lock, _NUMBER_BYTES, 0)
        return int(text) if text.strip().isdigit() else self._make_room(self._limit_bytes)

    def _make_room(self, most: float) -> int:
        """Deletes what was used longest ago until the files have at most `most` bytes; returns what they
        have."""
        found: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as folders:
            for folder in folders:
                if folder.is_dir():
                    found += _files(folder.path)
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= most:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used


def default_cache_folder() -> Path:
    """Returns `$AIPROD_DS_CACHE_DIR/shards`, else `$XDG_CACHE_HOME/aiprod_ds/shards`, else
    `~/.cache/aiprod_ds/shards`."""
    own, shared = os.environ.get("AIPROD_DS_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "aiprod_ds"
    return folder / "shards"


def _files(folder: str) -> Iterator[tuple[int, int, str]]:
    """Yields time of last use, size and path of each file; deletes what was being written when its writer
    died."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(_PART):  # writers hold the lock, so this one is dead
                Path(entry.path).unlink(missing_ok=True)
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # dropped meanwhile
                continue
            yield status.st_mtime_ns, status.st_size, entry.path


def _note(lock: int, used: int) -> None:
    os.pwrite(lock, str(used).ljust(_NUMBER_BYTES).encode(), 0)


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}{_PART}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
