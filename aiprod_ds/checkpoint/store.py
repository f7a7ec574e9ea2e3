"""A folder of checkpoints in which each one is whole or absent.

Owns the commit (temporary folder, manifest with size and sha256 of every file, fsync, rename, `latest` replaced atomically),
the search for the newest good checkpoint and its verification before anything is unpickled. Owns no collectives: the caller
lets every rank write into `open_pending(...)`, waits for all, and then commits on the main rank.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import file_sha256, write_atomically

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"^update_(\d{6,})$")
_PENDING = ".pending"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: its folder and the run state in it."""

    folder: Path
    state: RunState

    @property
    def engine_folder(self) -> Path:
        """Where the engine's own files are."""
        return self.folder / "engine"


class CheckpointStore:
    """Commits and finds checkpoints below one folder.

    Args:
        folder: `<run>/checkpoints`; made at the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_pending(self, updates: int) -> Path:
        """Makes and returns the empty folder that all ranks write the checkpoint of `updates` into. Main rank only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_pending()
        (self.pending_folder(updates) / "engine").mkdir(parents=True)
        return self.pending_folder(updates)

    def pending_folder(self, updates: int) -> Path:
        """Returns the name that `open_pending` uses, for the other ranks."""
        return self.folder / f"update_{updates:06d}{_PENDING}"

    def commit(self, updates: int, state: RunState) -> Path:
        """Turns the pending folder into the checkpoint of `updates`. Main rank only, after every rank has written its files.

        A checkpoint that is already there under this name is replaced only once the new one is whole on disk.
        """
        pending, final = self.pending_folder(updates), self.folder / f"update_{updates:06d}"
        _write_json(pending / "state.json", state.to_dict())
        _write_json(pending / "manifest.json", {"format": FORMAT, "files": _describe_files(pending)})
        _sync_tree(pending)
        if final.exists():
            replaced = final.with_name(final.name + ".replaced" + _PENDING)
            final.rename(replaced)
            pending.rename(final)
            shutil.rmtree(replaced)
        else:
            pending.rename(final)
        self._point_latest_at(final.name)
        return final

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies, or None when there has never been one.

        Raises:
            CheckpointError: If checkpoints exist and none of them is good: starting over would lose them silently.
        """
        names = self.names()
        problems: list[str] = []
        for name in names:
            try:
                return self.read(self.folder / name)
            except CheckpointError as error:
                problems.append(str(error))
                _LOG.warning("checkpoint_skipped name=%s reason=%s", name, error)
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of {len(names)} checkpoints is whole. {' '.join(problems)} "
                "Repair them, or start over with --resume never."
            )
        return None

    def read(self, folder: Path) -> Checkpoint:
        """Returns the checkpoint in `folder` after comparing every file with its manifest.

        Raises:
            CheckpointError: If the folder, the manifest or a file is missing, of another size or of other content.
        """
        manifest = _read_json(folder / "manifest.json")
        files = manifest.get("files")
        if manifest.get("format") != FORMAT or not isinstance(files, dict):
            raise CheckpointError(f"{folder}/manifest.json: must be of format {FORMAT}, got {manifest.get('format')!r}.")
        for name, expected in files.items():
            _check_file(folder, name, expected)
        return Checkpoint(folder=folder, state=RunState.from_dict(_read_json(folder / "state.json")))

    def names(self) -> list[str]:
        """Returns the names of all committed checkpoints, newest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = [match for entry in self.folder.iterdir() if entry.is_dir() and (match := _NAME.match(entry.name))]
        return [match[0] for match in sorted(found, key=lambda match: int(match[1]), reverse=True)]

    def _remove_pending(self) -> None:
        for entry in self.folder.glob(f"*{_PENDING}"):
            shutil.rmtree(entry)

    def _point_latest_at(self, name: str) -> None:
        write_atomically(self.folder / "latest", name + "\n")
        _sync(self.folder)


def _describe_files(folder: Path) -> dict[str, dict[str, object]]:
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in _files(folder)
        if path.name != "manifest.json"
    }


def _check_file(folder: Path, name: str, expected: dict[str, object]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}/manifest.json: files must stay inside the checkpoint, got {name!r}.")
    if not path.is_file():
        raise CheckpointError(f"{path}: listed in the manifest but missing.")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path}: must have {expected['bytes']} bytes, got {path.stat().st_size}.")
    if file_sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path}: content differs from the manifest's sha256.")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sync_tree(folder: Path) -> None:
    for path in [*_files(folder), *(entry for entry in folder.rglob("*") if entry.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; this is not a whole checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a mapping, got {type(value).__name__}.")
    return value
