"""Deleting a folder so that no half of it is ever taken for a whole one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from aiprod_ds.files import sync

_LOG = logging.getLogger(__name__)
PENDING = ".pending"  # of names: a save or a deletion that is not finished


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
    """Deletes a file or a folder with all it holds; of what resists, as an open file on NFS does, it tells."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        _LOG.warning("checkpoint_not_deleted path=%s error=%s", path, error)
