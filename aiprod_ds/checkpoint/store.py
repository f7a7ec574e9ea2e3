"""A folder of checkpoints in which each one is whole or absent.

Owns the commit, the search for the newest good checkpoint, and deletion. Owns no collectives: the caller lets
every rank write into `open_pending(...)`, waits for all, and then commits on the main rank. Names say what a
folder is:

    update_000500            a checkpoint
    update_000500.replaced   its predecessor of the same name, while the new one takes its place; it counts
                             where the new one is not there yet
    *.pending                a save or a deletion that is not finished; nobody reads it, and the next save
                             removes it
    bases/                   frozen weights that checkpoints refer to (`frozen_bases.py`)

At every moment of a save, and of the deletions after it, what stands is the old checkpoints or these and the
new one.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.checkpoint.consistency import require_consistent
from aiprod_ds.checkpoint.disk import PENDING, delete, discard, explained, require_space
from aiprod_ds.checkpoint.frozen_bases import delete_unfinished, delete_unreferenced, verify_base
from aiprod_ds.checkpoint.manifest import (
    FileRecord,
    HashCheck,
    read_manifest,
    read_mapping,
    verify_folder,
    write_manifest,
)
from aiprod_ds.checkpoint.retention import Standing, surplus
from aiprod_ds.checkpoint.shard_files import FACTS, holds_moments_only
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import file_sha256, sync, write_atomically

_LOG = logging.getLogger(__name__)
_REPLACED = ".replaced"
_NAME = re.compile(rf"update_([0-9]{{6,}})({_REPLACED})?")
_STATE = "state.json"
_FACTS = f"engine/{FACTS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was compared with its manifest: its folder and the run state in it."""

    folder: Path
    state: RunState

    @property
    def engine_folder(self) -> Path:
        """Where the engine's own files are."""
        return self.folder / "engine"


class CheckpointStore:
    """Commits, finds and deletes checkpoints below one folder.

    Args:
        folder: `<run>/checkpoints`; made at the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_pending(self, updates: int, *, num_bytes: int = 0) -> Path:
        """Makes and returns the empty folder that all ranks write the checkpoint of `updates` into. Main rank
        only.

        First it finishes or removes what an interrupted save left, then it looks for room.

        Args:
            updates: Applied updates of the run, after which the folder is named.
            num_bytes: Of its tensors; room is asked for these and a tenth of them.

        Raises:
            DiskFullError: If there is less room.
            CheckpointError: If the disk fails.
        """
        pending = self.pending_folder(updates)
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)
            self._finish_replacements()
            for leftover in (*self.folder.glob(f"*{PENDING}"), *self.folder.glob("latest.*.tmp")):
                delete(leftover)
            delete_unfinished(self.folder)
            require_space(self.folder, num_bytes * 11 // 10)
            (pending / "engine").mkdir(parents=True)
        return pending

    def pending_folder(self, updates: int) -> Path:
        """Returns the name that `open_pending` uses, for the other ranks."""
        return self.folder / f"{_name(updates)}{PENDING}"

    def commit(
        self,
        updates: int,
        state: RunState,
        known: Mapping[str, FileRecord] | None = None,
        *,
        beside: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Turns the pending folder into the checkpoint of `updates`. Main rank only, after every rank has
        written its files.

        A checkpoint that is already there under this name is replaced only once the new one is whole on disk.

        Args:
            updates: As in `open_pending`.
            state: Of the run after these updates; `read` refuses another clock.
            known: Of files, by path in the checkpoint, that their writers have hashed and brought to the
                disk.
            beside: Small files that stand beside the run state, by name.

        Raises:
            DiskFullError: If there was no room.
            CheckpointError: If the disk fails.
        """
        pending, final = self.pending_folder(updates), self.folder / _name(updates)
        replaced = final.with_name(final.name + _REPLACED)
        with explained(self.folder):
            (pending / _STATE).write_text(json.dumps(state.to_dict(), indent=1, sort_keys=True) + "\n")
            for name, content in (beside or {}).items():
                (pending / name).write_bytes(content)
            write_manifest(pending, known)
            for path in (*pending.rglob("*"), pending):
                sync(path)
            if final.exists():
                final.rename(replaced)
            pending.rename(final)
            sync(self.folder)  # before the old one goes, the new name must outlive a power cut
            if replaced.exists():
                discard(replaced)
            write_atomically(self.folder / "latest", final.name + "\n")
            sync(self.folder)
        return final

    def discard_pending(self, updates: int) -> None:
        """Removes what was written of a save that failed; what cannot be removed is left to the next save."""
        delete(self.pending_folder(updates))

    def prune(
        self, updates: int, config: CheckpointConfig, measure: Callable[[RunState], float | None]
    ) -> list[str]:
        """Deletes what the rules do not keep and returns the names. Main rank only, after
        `commit(updates, ...)`.

        Bases that no checkpoint refers to any more go too.

        The one just written stays. Those of later updates, which a run that went back to an earlier
        checkpoint has, and those that are not whole are neither counted nor deleted; for that all sizes are
        compared, but of hashes only the run state's.

        Args:
            updates: Those of the checkpoint just written.
            config: Without `keep_last` nothing is deleted.
            measure: Returns what `keep_best` compares; None where it was not taken.

        Raises:
            CheckpointError: If the disk fails.
        """
        if config.keep_last is None:
            return []
        with explained(self.folder):
            standing = [
                entry
                for name in self.names()
                if (entry := self._standing(name, measure)) and entry.updates <= updates
            ]
            if not standing or standing[0].updates != updates:  # only a newer whole one is a reason to delete
                return []
            names = surplus(standing, config)
            for name in names:
                discard(self.folder / name)
            delete_unreferenced(self.folder, self.names())
        return names

    def newest(
        self,
        *,
        weights_only: bool = False,
        hashes: HashCheck | None = None,
        accepts: Callable[[RunState], bool] = lambda _state: True,
    ) -> Checkpoint | None:
        """Returns the newest checkpoint that is accepted and verifies, or None when there has never been one.
        Changes nothing.

        Args:
            weights_only: See `read`.
            hashes: See `read`.
            accepts: Whether a run may go on from there; one that it does not accept counts as not there.

        Raises:
            CheckpointError: If checkpoints exist and none of them is good: starting over would lose them
                silently.
        """
        names = self.names()
        problems: list[str] = []
        for name in names:
            try:
                if not accepts(_read_state(self.folder / name)):
                    _LOG.warning("checkpoint_passed_over name=%s reason=given_up", name)
                    continue
                return self.read(self.folder / name, weights_only=weights_only, hashes=hashes)
            except CheckpointError as error:
                problems.append(str(error))
                _LOG.warning("checkpoint_skipped name=%s reason=%s", name, error)
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of {len(names)} checkpoints is whole. {' '.join(problems)} "
                "Repair them, or start over with --resume never."
            )
        return None

    def read(
        self, folder: Path, *, weights_only: bool = False, hashes: HashCheck | None = None
    ) -> Checkpoint:
        """Returns the checkpoint in `folder` after comparing it, and the base that it needs, with their
        manifests.

        Args:
            folder: Of this run or another.
            weights_only: Whether the caller reads no moments: then files of moments are compared but for
                their hashes.
            hashes: Is left to compare files of tensors, and the caller to confirm it; None: all is compared
                here.

        Raises:
            CheckpointError: If `folder` is no whole checkpoint, another one than its name says, or its run
                state contradicts itself.
        """
        if folder.is_symlink():
            raise CheckpointError(f"{folder}: must be a folder, got a link. Name the folder itself.")
        files = verify_folder(
            folder, is_read=lambda name: not (weights_only and holds_moments_only(name)), hashes=hashes
        )
        if _STATE not in files:
            raise CheckpointError(
                f"{folder}/manifest.json: must list {_STATE}, got no such entry. Take a whole checkpoint."
            )
        if _FACTS in files:
            verify_base(folder, hashes=hashes)
        state = _read_state(folder)
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) != state.clock.updates:
            raise CheckpointError(
                f"{folder}: must hold the update that its name says, got update {state.clock.updates}. Give "
                "it its own name back."
            )
        require_consistent(state, where=str(folder))
        return Checkpoint(folder=folder, state=state)

    def states(self) -> list[tuple[str, RunState]]:
        """Returns name and run state of all committed checkpoints whose state can be read, newest first; the
        rest of them is not looked at.

        Raises:
            CheckpointError: If the folder cannot be read.
        """
        found = []
        for name in self.names():
            with suppress(CheckpointError):
                found.append((name, _read_state(self.folder / name)))
        return found

    def names(self) -> list[str]:
        """Returns the names of all committed checkpoints, newest first, whole or not.

        Raises:
            CheckpointError: If the folder cannot be read.
        """
        try:
            found = {entry.name for entry in self.folder.iterdir() if entry.is_dir()}
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: must be a readable folder, got {error}. Check its permissions."
            ) from error
        return sorted((name for name in found if _counts(name, found)), key=_updates, reverse=True)

    def _standing(self, name: str, measure: Callable[[RunState], float | None]) -> Standing | None:
        folder = self.folder / name
        try:
            files = read_manifest(folder)
            if folder.is_symlink() or any(
                (folder / file).stat().st_size != record.bytes for file, record in files.items()
            ):
                return None
            if _STATE not in files or file_sha256(folder / _STATE) != files[_STATE].sha256:
                return None
            state = _read_state(folder)
            return Standing(
                name=name, updates=_updates(name), value=measure(state), is_doubtful=state.is_doubtful
            )
        except (OSError, CheckpointError):
            return None

    def _finish_replacements(self) -> None:
        for replaced in self.folder.glob(f"update_*{_REPLACED}"):
            if not _NAME.fullmatch(replaced.name):
                continue
            final = replaced.with_name(replaced.name.removesuffix(_REPLACED))
            if final.exists():
                discard(replaced)
            else:
                replaced.rename(final)
                sync(self.folder)


def _name(updates: int) -> str:
    return f"update_{updates:06d}"


def _updates(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None, f"{name} is the name of a checkpoint"
    return int(match[1])


def _counts(name: str, found: set[str]) -> bool:
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    final = _name(int(match[1]))
    return name == final or (name == final + _REPLACED and final not in found)


def _read_state(folder: Path) -> RunState:
    try:
        return RunState.from_dict(read_mapping(folder / _STATE))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
