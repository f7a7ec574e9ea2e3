"""Where shards lie: a folder, a web server or a bucket, behind one small interface.

Owns the choice by address, and that a transfer that breaks off is taken up where it broke off. `http.py` and
`s3.py` know their protocols. Called by the other files of the room.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiprod_ds.bad_disk import fault_in_words
from aiprod_ds.errors import DataError, StorageError
from aiprod_ds.files import replacing

INDEX = "index.jsonl.gz"
REMOTE_SCHEMES = ("s3", "https", "http")
DEFAULT_PATIENCE_SECONDS = 5.0
_ATTEMPTS = 5  # in a row that bring no byte, before it is asked whether the file or the storage is at fault
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 30.0


class NoSuchFileError(DataError):
    """There is no file of that name."""


class InterruptedTransferError(DataError):
    """A transfer that may succeed if it is asked for again."""


class Storage(Protocol):
    """Files by name under one address.

    Attributes:
        address: How messages name it.
        is_remote: Whether what is read often should be kept on a local disk.
        patience_seconds: How long a storage that is out of reach is waited for.
    """

    address: str
    is_remote: bool
    patience_seconds: float

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Returns `size` bytes from `start` on; None: all that follow. Fewer only where the file ends.

        Raises:
            NoSuchFileError: If there is no such file.
            StorageError: If nothing can be read, after waiting for it where that may help.
            DataError: If this file cannot be read, after several attempts.
        """

    def sizes(self) -> Mapping[str, int] | None:
        """Returns the bytes of every file; None where the server does not list them.

        Raises:
            DataError: If it cannot be reached.
        """

    def write(self, name: str, file: Path) -> None:
        """Puts a copy of a local file there, whole or not at all.

        Raises:
            DataError: If it cannot be written.
        """


class FolderStorage:
    """A folder of this machine or of a network file system; a `Storage`."""

    is_remote = False

    def __init__(self, folder: Path) -> None:
        self.address = str(folder)
        self.patience_seconds = DEFAULT_PATIENCE_SECONDS  # a file system has its own
        self._folder = folder

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """See `Storage.read`."""
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if size is None else size)
        except FileNotFoundError as error:
            raise NoSuchFileError(f"{self._folder / name}: must exist, got no such file.") from error
        except OSError as error:
            raise DataError(f"{self._folder / name}: must be readable, got: {error.strerror}.") from error

    def sizes(self) -> dict[str, int]:
        """See `Storage.sizes`."""
        try:
            return {path.name: path.stat().st_size for path in self._folder.iterdir() if path.is_file()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"{self._folder}: must be a readable folder, got: {error.strerror}.") from error

    def write(self, name: str, file: Path) -> None:
        """See `Storage.write`; moves a file that is on the same disk."""
        target = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary, file.open("rb") as source, temporary.open("wb") as copy:
                while block := source.read(16 << 20):
                    copy.write(block)
        except OSError as error:
            words = fault_in_words(error, target)
            raise DataError(f"{target}: must be writable, got: {words}. Make room.") from error


class RangeStorage(ABC):
    """Files that are read by ranges of bytes over a connection; the reading half of a `Storage`.

    Args:
        address: Without the slash at its end.
    """

    is_remote = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.patience_seconds = DEFAULT_PATIENCE_SECONDS
        self._connections: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}}

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """See `Storage.read`."""

        def fetch(done: int) -> Iterator[bytes]:
            if size is not None and done >= size:
                return
            yield from self._stream(name, start + done, None if size is None else start + size)

        return transferred(
            fetch,
            size=size,
            where=f"{self.address}/{name}",
            is_reachable=self._is_reachable,
            patience_seconds=self.patience_seconds,
        )

    def _is_reachable(self) -> bool:
        try:
            return any(self._stream(INDEX, 0, 1))
        except DataError:
            return False

    def _connection(self) -> Any:
        """Returns the connection of this process; that of a parent is not to be used in a fork."""
        if os.getpid() not in self._connections:
            self._connections = {os.getpid(): self._connect()}
        return self._connections[os.getpid()]

    @abstractmethod
    def _connect(self) -> Any:
        """Returns a new connection."""

    @abstractmethod
    def _stream(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        """Yields the bytes from `start` to before `end`; None: all that follow."""


def byte_range(start: int, end: int | None) -> str:
    """Returns the range from `start` to before `end` as HTTP writes it; None: all that follow."""
    return f"bytes={start}-{'' if end is None else end - 1}"


def is_remote(source: str) -> bool:
    """Returns whether a source is an address and no path."""
    return source.partition("://")[0] in REMOTE_SCHEMES and "://" in source


def open_storage(source: str, *, endpoint_url: str | None = None) -> Storage:
    """Returns the files under a path, `file://`, `s3://bucket/prefix` or `https://host/path`.

    Args:
        endpoint_url: Of a server with S3's protocol that is not Amazon's.

    Raises:
        DataError: If the address is of another kind or holds secrets, or the extra `storage` is not
            installed.
    """
    if not is_remote(source):
        return FolderStorage(Path(source.removeprefix("file://")))
    parts = urlsplit(source)
    if parts.username or parts.password or parts.query or parts.fragment or not parts.netloc:
        # What stands in an address would stand in logs and reports too; so would its quotation here.
        raise DataError(
            f"{parts.scheme}://{parts.hostname or ''}: an address of shards must have a host or bucket and "
            "no user, password, query or fragment. Give secrets by the environment or a profile."
        )
    if parts.scheme == "s3":
        from aiprod_ds.shards.s3 import S3Storage

        return S3Storage(parts.netloc, parts.path.strip("/"), endpoint_url=endpoint_url)
    from aiprod_ds.shards.http import HttpStorage

    return HttpStorage(source.rstrip("/"))


def transferred(
    fetch: Callable[[int], Iterator[bytes]],
    *,
    size: int | None,
    where: str,
    is_reachable: Callable[[], bool],
    patience_seconds: float,
    wait: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> bytes:
    """Returns the bytes that `fetch` yields; after an interruption it is called again for the rest, with
    growing waits while nothing comes.

    Args:
        fetch: Given how many bytes there are already, yields those after them.
        size: How many there must be; None: as many as come until an orderly end.
        where: How messages name the file.
        is_reachable: Asked after five attempts in a row that brought nothing, and then after each: whether
            another file can be read.
        patience_seconds: How long to go on while none can, attempts included.
        wait: Sleeps.
        now: A clock.

    Raises:
        DataError: If others can be read and this one cannot.
        StorageError: If none can.
    """
    received = bytearray()
    fruitless, since = 0, 0.0
    while True:
        before = len(received)
        try:
            for block in fetch(len(received)):
                received += block
            if size is None or len(received) >= size:
                return bytes(received)
            reason: Exception = InterruptedTransferError(f"{len(received)} of {size} bytes")
        except InterruptedTransferError as error:
            reason = error
        fruitless = 0 if len(received) > before else fruitless + 1
        since = now() if fruitless <= 1 else since
        if fruitless >= _ATTEMPTS and is_reachable():
            raise DataError(
                f"{where}: must be readable as other files there are, got: {reason}. Pack it again."
            ) from reason
        left = since + patience_seconds - now()
        if fruitless and left <= 0:
            raise StorageError(
                f"{where}: must be delivered by its storage, got: {reason}, and nothing else within "
                f"{patience_seconds:g} s. Check storage and network; the same command goes on."
            ) from reason
        wait(min(_FIRST_WAIT_SECONDS * 2**fruitless, _LONGEST_WAIT_SECONDS, left))
