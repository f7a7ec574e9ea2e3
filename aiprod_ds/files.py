"""What several parts do with files: find them, read or replace one as a whole, hash it, bring it to the disk.
Nothing about what is in it."""

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 20
SETTINGS_BYTES = 64 << 20
"""The most that is read of a file of settings; the index of a large model has some megabytes."""


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` is either the old file or the whole new one, also after a crash of the
    machine.

    Several processes may do so at the same time: each writes a temporary file of its own beside `path`, and
    the last rename wins. After an error the temporary file is gone; a process that is killed leaves it for
    `remove_temporary`.
    """
    write_lines_atomically(path, (text.encode("utf-8"),))


def write_lines_atomically(path: Path, lines: Iterable[bytes]) -> None:
    """Writes `lines` one after the other, as `write_atomically` does a text; they need not fit into memory
    together."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path` to a body that writes it; then it takes the place of
    `path`, as a whole.

    For what writes a file by its name, as libraries do. After an error the temporary file is gone.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise


def remove_temporary(folder: Path) -> None:
    """Deletes temporary files in `folder` and below, which a process left that was killed or whose disk kept
    them. Nobody else may write there meanwhile.

    Raises:
        OSError: If one cannot be deleted.
    """
    for path in folder.rglob("*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _remove(temporary: Path) -> None:
    """Deletes it; what ended the write is to be told, not that a disk which is read-only by now keeps it."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def read_whole(path: Path, *, limit: int = SETTINGS_BYTES) -> bytes:
    """Returns the bytes of a regular file.

    A pipe, which would wait for ever, and a device, which may never end, are refused before they are read.

    Args:
        path: Links are followed.
        limit: The most bytes that the file may have.

    Raises:
        OSError: If it is none, is larger or cannot be read; `strerror` says why.
    """
    with _open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data


def _open_regular(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, "the name holds a null byte", str(path)) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")  # noqa: PTH123  a descriptor, not a path
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_text(path: Path, *, limit: int = SETTINGS_BYTES) -> str:
    """Returns the text of a regular file in UTF-8, with line feeds at the ends of lines.

    Raises:
        OSError: As `read_whole`.
        UnicodeDecodeError: If it is not UTF-8.
    """
    return read_whole(path, limit=limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def folder_problem(folder: Path) -> str | None:
    """Returns why `folder` cannot be made or written into; None if it can. Nothing stays behind.

    It is found by making and removing a folder in the nearest that exists: permissions alone do not tell of
    file systems that are read-only, or whose server decides.
    """
    if "\0" in str(folder):  # Python 3.12 says of such a path that it does not exist
        return "the name holds a null byte"
    try:
        os.fsencode(folder)
        if folder.exists() and not folder.is_dir():
            return "it is no folder"
        parent = folder
        while not parent.exists():
            if len(os.fsencode(parent.name)) > os.pathconf("/", "PC_NAME_MAX"):
                return os.strerror(errno.ENAMETOOLONG)
            parent = parent.parent
        Path(tempfile.mkdtemp(prefix=".aiprod-ds-", dir=parent)).rmdir()
    except UnicodeEncodeError:
        return "it is no text"
    except OSError as error:
        return error.strerror
    return None


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(
    folder: Path, *, on_error: Callable[[str, OSError], None] = lambda _path, _error: None
) -> Iterator[str]:
    """Yields the regular files in a folder and below it, by path from there with slashes, sorted by it; in
    linked folders too, each real folder once. A link to nothing counts as a file, which is missing.

    Only the names of one folder, and of those above it, are in memory.

    Args:
        folder: Where to look.
        on_error: Called with the path from there of a folder that cannot be listed, or of a link that cannot
            be followed, and why.
    """
    seen = {os.path.realpath(folder)}
    waiting: list[Iterator[tuple[str, os.DirEntry[str]]]] = [_sorted_entries(str(folder), "", on_error)]
    while waiting:
        path, entry = next(waiting[-1], ("", None))
        if entry is None:
            waiting.pop()
        elif path.endswith("/"):
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                waiting.append(_sorted_entries(entry.path, path, on_error))
        elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            yield path


def _sorted_entries(
    folder: str, path: str, on_error: Callable[[str, OSError], None]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Returns the entries of a folder by path; that of a folder ends in a slash, which makes the order of
    entries that of all paths."""
    found = []
    try:
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        on_error(path, error)
        return iter(())
    for entry in listed:
        try:
            found.append((f"{path}{entry.name}{'/' if entry.is_dir() else ''}", entry))
        except OSError as error:  # A link in a circle, or into a folder that may not be entered.
            on_error(f"{path}{entry.name}", error)
    return iter(sorted(found, key=lambda item: item[0]))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a regular file's bytes as 64 hexadecimal digits, read in blocks.

    Raises:
        OSError: If it is none or cannot be read.
    """
    digest = hashlib.sha256()
    with _open_regular(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
