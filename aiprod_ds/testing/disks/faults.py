"""A disk that takes nothing for a while: every operation by which Python code writes below a folder is
counted, and those of a range fail.

Owns the counting and the faults, at the level of `os` and `open`, for tests of this project and of its users.
What a library writes without Python, as safetensors does, is not seen; a small disk of the test's own shows
that.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

ERRNOS = {
    "full": errno.ENOSPC,
    "read-only": errno.EROFS,
    "failing": errno.EIO,
    "stale": errno.ESTALE,
    "gone": errno.ENOENT,
}
"""What a disk can be -> what it says then. `gone` also renames the folder meanwhile, as an unmounted disk's
is."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_NAMED = ("mkdir", "rename", "replace", "unlink", "remove")
_FREEING = ("unlink", "remove", "ftruncate")  # what a full disk still does
_OF_DESCRIPTORS = ("write", "fsync", "ftruncate")


@dataclass(slots=True)
class BadDisk:
    """Counts writes below a folder, and fails.

    Attributes:
        folder: Others are left alone.
        kind: Of `ERRNOS`.
        at: Number of the first operation that fails; None: none does.
        count: How many fail, one after the other.
        without: Folders inside whose operations are neither counted nor fail.
        seen: Operation and path of each, in order.
    """

    folder: Path
    kind: str = "full"
    at: int | None = None
    count: int = 1
    without: tuple[str, ...] = ()
    seen: list[tuple[str, str]] = field(default_factory=list)
    _is_renamed: bool = False

    def meet(self, name: str, path: object) -> None:
        """Counts an operation.

        Raises:
            OSError: If it is one that fails.
        """
        place = os.path.abspath(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""  # noqa: PTH100
        root = str(self.folder)
        if not place.startswith(root) or any(place.startswith(f"{root}/{one}") for one in self.without):
            return
        number = len(self.seen)
        self.seen.append((name, place[len(root) + 1 :]))
        fails = self.at is not None and self.at <= number < self.at + self.count
        if self.kind == "full" and name in _FREEING:
            fails = False
        if self.kind == "gone":
            self._rename(is_gone=fails)
        if fails:
            code = ERRNOS[self.kind]
            raise OSError(code, os.strerror(code), str(path))

    def _rename(self, *, is_gone: bool) -> None:
        away = self.folder.with_name(f"{self.folder.name}.unmounted")
        if is_gone != self._is_renamed:
            source, target = (self.folder, away) if is_gone else (away, self.folder)
            with suppress(FileNotFoundError):  # before it is made
                _REAL["rename"](source, target)
                self._is_renamed = is_gone

    def is_away(self, path: object) -> bool:
        """Returns whether `path` is looked for where the folder was; that, too, is an operation then, so that
        who looks first sees the end of it."""
        return self._is_renamed and str(path).startswith(str(self.folder))

    def mount_again(self) -> None:
        """Ends what `gone` does, if no later operation has."""
        self._rename(is_gone=False)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts and fails within the block."""
        calls: dict[str, Any] = {name: _of_name(name, self) for name in _NAMED}
        calls |= {name: _of_descriptor(name, self) for name in _OF_DESCRIPTORS}
        with (
            patch.multiple(os, **calls),
            patch.object(os, "open", _os_open(self)),
            patch.object(os, "stat", _stat(self)),
            patch.object(builtins, "open", _opening(self)),
            patch.object(io, "open", _opening(self)),
        ):
            try:
                yield
            finally:
                self.mount_again()


_REAL: dict[str, Callable[..., Any]] = {
    name: getattr(os, name) for name in (*_NAMED, *_OF_DESCRIPTORS, "open", "stat")
}
_REAL_OPEN = io.open


def _of_name(name: str, disk: BadDisk) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is None:
            disk.meet(name, path)
        return _REAL[name](path, *arguments, **options)

    return call


def _of_descriptor(name: str, disk: BadDisk) -> Callable[..., Any]:
    def call(descriptor: Any, *arguments: Any) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        disk.meet(name, os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
        return _REAL[name](descriptor, *arguments)

    return call


def _stat(disk: BadDisk) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if disk.is_away(path):
            disk.meet("stat", path)
        return _REAL["stat"](path, *arguments, **options)

    return call


def _os_open(disk: BadDisk) -> Callable[..., int]:
    def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & _WRITES and options.get("dir_fd") is None:
            disk.meet("open", path)
        descriptor: int = _REAL["open"](path, flags, *arguments, **options)
        return descriptor

    return call


def _opening(disk: BadDisk) -> Callable[..., Any]:
    def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return _REAL_OPEN(file, mode, *arguments, **options)
        disk.meet("open", file)
        return _Watched(_REAL_OPEN(file, mode, *arguments, **options), disk, file)

    return call


class _Watched:
    """A file open for writing whose writes are operations of their own."""

    def __init__(self, file: Any, disk: BadDisk, path: Any) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> Any:
        self._disk.meet("write", self._path)
        return self._file.write(data)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
