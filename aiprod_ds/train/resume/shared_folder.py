"""Whether all ranks see one folder under the same name.

The run folder must be on a file system that all ranks share; a folder of the same name on each node's own
disk is found out before anything is written into it. Called at the start of a run and at each save.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from uuid import uuid4

from aiprod_ds.checkpoint.disk import explained
from aiprod_ds.engine import dist
from aiprod_ds.errors import CheckpointError

_TOKEN = ".seen_by_all_ranks"
_SEEN_WITHIN_SECONDS = 90.0  # NFS may hide a new folder from other clients for 60


def require_shared(folder: Path, *, within_seconds: float = _SEEN_WITHIN_SECONDS) -> None:
    """Checks that every rank sees in `folder` what rank 0 writes there. Collective; leaves the folder as it
    was.

    Args:
        folder: Exists for rank 0.
        within_seconds: How long others look for it.

    Raises:
        CheckpointError: On every rank, if one does not see it.
    """
    if dist.world_size() == 1:
        return
    token = dist.from_main(lambda: _write_token(folder))
    blind = [
        host
        for host, sees in dist.gather_objects((socket.gethostname(), _sees(folder, token, within_seconds)))
        if not sees
    ]
    dist.from_main(lambda: _remove_token(folder))
    if blind:
        raise CheckpointError(
            f"{folder}: must be one folder for all ranks, got {len(blind)} ranks on "
            f"{', '.join(sorted(set(blind)))} "
            "that do not see what rank 0 writes there. Put output_dir on a file system that all nodes share."
        )


def _write_token(folder: Path) -> str:
    token = uuid4().hex
    with explained(folder):
        (folder / _TOKEN).write_text(token)
    return token


def _remove_token(folder: Path) -> None:
    with explained(folder):
        (folder / _TOKEN).unlink(missing_ok=True)


def _sees(folder: Path, token: str, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            if (folder / _TOKEN).read_text() == token:
                return True
        except OSError:
            pass  # not yet, or never
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
