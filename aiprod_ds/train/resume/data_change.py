"""Whether the data of a run is the data that it had: the list of its clips stands in every checkpoint.

Owns the name of that file, its comparison at a resume, and which settings count by the clips that they choose
rather than by their values. What a list is, and how two differ, is `aiprod_ds.data.clip_list`'s.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiprod_ds.checkpoint.manifest import read_manifest
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.run import RunConfig
from aiprod_ds.data.clip_changes import changes, in_words
from aiprod_ds.data.clip_list import ClipList
from aiprod_ds.errors import CheckpointError, ConfigError, DataError
from aiprod_ds.files import read_whole

CLIPS = "clips.jsonl.gz"
ACCEPT = "--accept-changed-data"
_MAX_BYTES = 1 << 30
# They choose the clips and do nothing else. With a list of these at hand, their values need not stay: a
# folder may move, and files that broke may be passed over.
_CHOOSING = ("train", "validation", "holdout_fraction", "max_unreadable_fraction")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """What became of the data since a checkpoint.

    Attributes:
        change: In words; None if it is the same, or if nobody knows.
        selection: The settings that had chosen the clips; None where the checkpoint has no list.
    """

    change: str | None = None
    selection: Mapping[str, Any] | None = field(default=None)


def selection_of(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that choose the clips of a run."""
    return {key: getattr(config.data, key) for key in _CHOOSING}


def with_selection(config: RunConfig, selection: Mapping[str, Any] | None) -> RunConfig:
    """Returns `config` as if it chose its clips as a checkpoint's run did; as it is where nobody knows."""
    if selection is None:
        return config
    known = {key: selection[key] for key in _CHOOSING if key in selection}
    return config.model_copy(update={"data": config.data.model_copy(update=known)})


def read_clips(folder: Path) -> ClipList | None:
    """Returns the list of clips in a checkpoint, compared with the manifest; None in one from before there
    were lists.

    Raises:
        CheckpointError: If it is damaged.
    """
    path, record = folder / CLIPS, read_manifest(folder).get(CLIPS)
    if record is None:
        return None
    try:
        content = read_whole(path, limit=_MAX_BYTES)
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: content differs from the manifest's sha256.")
        return ClipList.read(content, where=str(path))
    except (OSError, DataError) as error:
        raise CheckpointError(f"{path}: must be readable, got {error}. Take a whole checkpoint.") from error


def compare(folder: Path | None, clips: Callable[[], ClipList]) -> DataCheck:
    """Returns how the data differs from that of a checkpoint. Main rank only.

    Args:
        folder: Of the checkpoint; None for a run that begins.
        clips: Returns the list of the run's own clips.

    Raises:
        CheckpointError: If the list of the checkpoint is damaged.
        DataError: If the list of the run cannot be made.
    """
    if folder is None:
        return DataCheck()
    saved = read_clips(folder)
    if saved is None:
        _LOG.info("data_not_compared checkpoint=%s: it is from before lists of clips", folder.name)
        return DataCheck()
    now = clips()
    if saved.by != now.by:
        _LOG.warning(
            "data_compared_without_content checkpoint=%s: its list has %s, data.fingerprint asks for %s",
            folder.name,
            saved.by,
            now.by,
        )
    return DataCheck(change=in_words(changes(saved, now)) or None, selection=saved.selection)


def require_same_data(check: DataCheck, *, accepted: bool, where: str) -> None:
    """Checks that the data is what the checkpoint's run had, or that a change was accepted.

    Args:
        check: From `compare`.
        accepted: Whether the run may go on with other data.
        where: How messages name the checkpoint.

    Raises:
        ConfigError: If it is not; says what was added, lost or altered.
    """
    if check.change is not None and not accepted:
        raise ConfigError(
            f"{where}: must go on with the data that the run had, got a change. {check.change}. Restore the "
            f"data, or give {ACCEPT} to go on knowingly: the running epoch then draws by the new list, so "
            "that some of its clips may come twice and others not at all."
        )


def change_since_saved(output_dir: Path, clips: Callable[[], ClipList]) -> str | None:
    """Returns in words how the data differs from what the run in `output_dir` had; None if it does not, or if
    there is no run whose checkpoint says what it had. Hashes no weights.

    Raises:
        DataError: If the list of the run cannot be made.
    """
    store = CheckpointStore(output_dir / "checkpoints")
    for name in store.names():
        try:
            change = compare(store.folder / name, clips).change
        except CheckpointError:  # `train` skips it, too
            continue
        return None if change is None else f"{name} of the run in {output_dir} had other data. {change}"
    return None
