"""What several parts do with a file: replace it as a whole, hash it, bring it to the disk. Nothing about what
is in it."""

import hashlib
import os
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` is either the old file or the whole new one, also after a crash of the
    machine.

    Several processes may do so at the same time: each writes a temporary file of its own beside `path`, and
    the last rename wins. After an error the temporary file is gone; a process that is killed leaves it, and
    one with the same id writes over it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the file's bytes as 64 hexadecimal digits, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
