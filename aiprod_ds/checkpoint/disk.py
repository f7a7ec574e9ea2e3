"""The disk under checkpoints: room, asked for before a save and recognised as what ended a write, and
deletion.

Owns what an `OSError` means to the user, and that a folder has a name that does not count before anything in
it goes. What is deleted is decided in `store.py` and `frozen_bases.py`.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiprod_ds.bad_disk import free_in_words, is_disk_fault
from aiprod_ds.errors import AiprodError, CheckpointError
from aiprod_ds.files import sync

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = "No space left on device"  # safetensors' error, whose file is gone again by then
_FULL_BELOW_BYTES = 1 << 20  # what is free after a write failed for want of room
_FIX = "Free some, lower checkpoint.keep_last, or save less often."
_LOG = logging.getLogger(__name__)
PENDING = ".pending"  # of names: a save or a deletion that is not finished


class DiskFaultError(CheckpointError):
    """The disk is full, read-only, failing or gone, and does not take a checkpoint. Those before it are as
    they were."""


class DiskFullError(DiskFaultError):
    """There is no room for a checkpoint."""


def require_space(folder: Path, num_bytes: int) -> None:
    """Checks that the file system of `folder`, which exists, has `num_bytes` free for this user.

    Raises:
        DiskFullError: If it has less.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskFullError(
            f"{folder}: must have {num_bytes:,} bytes free for the next checkpoint, got {free:,}. {_FIX}"
        )


def write_error(error: Exception, folder: Path) -> AiprodError:
    """Returns what a failed write into `folder` means: an error of this package as it is, `DiskFullError`,
    `DiskFaultError`, or `CheckpointError` of what no disk says.

    safetensors says in words only that the disk was full, torch not at all; what is free then decides.
    """
    if isinstance(error, AiprodError):
        return error
    told = error.errno if isinstance(error, OSError) else None
    if told in _FULL or (told is None and (_FULL_IN_WORDS in str(error) or _is_full(folder))):
        return DiskFullError(
            f"{folder}: must have room for the checkpoint, got {error}{_free(folder)}. {_FIX}"
        )
    kind = DiskFaultError if is_disk_fault(error) else CheckpointError
    return kind(
        f"{folder}: must take the checkpoint, got {type(error).__name__}: {error}{_free(folder)}. Check disk "
        "and permissions."
    )


def _free(folder: Path) -> str:
    free = free_in_words(folder)
    return "" if free is None else f" ({free})"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns an `OSError` of the body, or what a library says in its place, into what `write_error` makes of
    it, so that other ranks can be told."""
    try:
        yield
    except AiprodError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_fault(error):
            raise
        raise write_error(error, folder) from error


def _is_full(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    return existing is not None and shutil.disk_usage(existing).free < _FULL_BELOW_BYTES


def discard(folder: Path) -> None:
    """Deletes a folder that counts; before anything in it goes, it has a name that does not count.

    Raises:
        OSError: If it cannot be renamed.
    """
    doomed = folder.with_name(f"{folder.name}.deleted{PENDING}")
    folder.rename(doomed)
    sync(folder.parent)
    delete(doomed)


def delete(path: Path) -> None:
    """Deletes a file or a folder with all it holds; of what resists, as an open file on NFS does, it
    tells."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        _LOG.warning("checkpoint_not_deleted path=%s error=%s", path, error)
