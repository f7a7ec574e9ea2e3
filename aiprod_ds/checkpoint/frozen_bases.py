"""The frozen weights that checkpoints of adapters refer to, where the run itself has made them: each set
written once.

    bases/<sha256>/manifest.json      as of a checkpoint
    bases/<sha256>/engine/...         chunks, of kind `frozen` only

Owns these folders: their commit, their comparison with the manifest, and the deletion of those that no
checkpoint refers to. Knows no engine and no collectives; a base is committed before the first checkpoint that
refers to it. Called by `store.py` and by saving.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aiprod_ds.checkpoint.disk import PENDING, delete, discard, explained, require_space
from aiprod_ds.checkpoint.manifest import HashCheck, read_mapping, verify_folder, write_manifest
from aiprod_ds.checkpoint.shard_files import FACTS, base_folder
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import sync
from aiprod_ds.snapshot import Base

BASES = "bases"
_ENGINE_FACTS = f"engine/{FACTS}"


def has_base(checkpoints: Path, sha256: str) -> bool:
    """Returns whether a base is there and is what its manifest says; reads all of it."""
    try:
        verify_folder(base_folder(checkpoints, sha256))
    except CheckpointError:
        return False
    return True


def open_base(checkpoints: Path, sha256: str, *, num_bytes: int) -> Path:
    """Makes and returns the empty folder that all ranks write a base into. Main rank only.

    Raises:
        DiskFullError: If there is less room than for `num_bytes` and a tenth of them.
        CheckpointError: If the disk fails.
    """
    pending = _pending(checkpoints, sha256)
    with explained(checkpoints):
        (checkpoints / BASES).mkdir(parents=True, exist_ok=True)
        sync(checkpoints)
        delete_unfinished(checkpoints)
        require_space(checkpoints, num_bytes * 11 // 10)
        (pending / "engine").mkdir(parents=True)
    return pending


def commit_base(checkpoints: Path, sha256: str) -> None:
    """Turns the pending folder into the base. Main rank only, after every rank has written its files.

    Raises:
        DiskFullError: If there was no room.
        CheckpointError: If the disk fails.
    """
    pending, final = _pending(checkpoints, sha256), base_folder(checkpoints, sha256)
    with explained(checkpoints):
        write_manifest(pending)
        for path in (*pending.rglob("*"), pending):
            sync(path)
        if final.exists():  # damaged, or it would not be written again
            discard(final)
        pending.rename(final)
        sync(final.parent)


def discard_pending_base(checkpoints: Path, sha256: str) -> None:
    """Removes what was written of a base that failed; what cannot be removed is left to the next save."""
    delete(_pending(checkpoints, sha256))


def delete_unfinished(checkpoints: Path) -> None:
    """Removes what interrupted writers and deletions of bases left."""
    for leftover in (checkpoints / BASES).glob(f"*{PENDING}"):
        delete(leftover)


def base_of(folder: Path) -> Base | None:
    """Returns what the checkpoint in `folder` refers to; None if it holds everything itself.

    Raises:
        CheckpointError: If it cannot be read.
    """
    path = folder / _ENGINE_FACTS
    try:
        return Base.from_dict(read_mapping(path).get("base"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def verify_base(folder: Path, *, hashes: HashCheck | None = None) -> None:
    """Compares the base that the checkpoint in `folder` refers to with its manifest, if this run has stored
    it.

    Args:
        folder: A checkpoint; its base is looked for beside it, in `bases/`.
        hashes: See `verify_folder`.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    base = base_of(folder)
    if base is None or not base.is_stored:
        return
    stored = base_folder(folder.absolute().parent, base.sha256)
    if not stored.is_dir() or stored.is_symlink():
        raise CheckpointError(
            f"{folder}: needs the weights that it refers to, but {stored} is missing. Put that folder back."
        )
    verify_folder(stored, hashes=hashes)


def delete_unreferenced(checkpoints: Path, names: Iterable[str]) -> list[str]:
    """Deletes the bases that none of the checkpoints `names` refers to, and returns theirs. Main rank only.

    If one of them cannot be read, all bases stay: it may be repaired.

    Raises:
        OSError: If the disk fails.
    """
    stored = [
        path for path in (checkpoints / BASES).glob("*") if path.is_dir() and not path.name.endswith(PENDING)
    ]
    if not stored:
        return []
    try:
        needed = {base.sha256 for name in names if (base := base_of(checkpoints / name)) is not None}
    except CheckpointError:
        return []
    surplus = [path for path in stored if path.name not in needed]
    for path in surplus:
        discard(path)
    return [path.name for path in surplus]


def _pending(checkpoints: Path, sha256: str) -> Path:
    final = base_folder(checkpoints, sha256)
    return final.with_name(final.name + PENDING)
