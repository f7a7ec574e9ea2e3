"""Saving a checkpoint from all ranks: what the ranks must agree on around `CheckpointStore`.

Every rank writes into one folder that rank 0 makes and commits, so the run folder must be on a file system that all ranks share;
a folder of the same name on each node's own disk is found out before anything is written into it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from aiprod_ds.checkpoint.bases import commit_base, discard_pending_base, has_base, open_base
from aiprod_ds.checkpoint.pieces import PieceReader, write_pieces
from aiprod_ds.checkpoint.space import DiskFullError, explained, write_error
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import AiprodError, CheckpointError
from aiprod_ds.optim.ema import Ema
from aiprod_ds.pieces import Base, Captured, EngineFacts
from aiprod_ds.train.base import require_start

_LOG = logging.getLogger(__name__)
_TOKEN = ".seen_by_all_ranks"
_SEEN_WITHIN_SECONDS = 90.0  # NFS may hide a new folder from other clients for 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """Saves and prunes the checkpoints of one run.

    Attributes:
        store: Where to.
        config: What to keep, and what to do without room.
        phase_names: Of the curriculum, by the index that the clock has.
    """

    store: CheckpointStore
    config: CheckpointConfig
    phase_names: tuple[str, ...]
    _stored: set[str] = field(default_factory=set)  # bases that are whole

    def save(self, engine: Engine, ema: Ema | None, state: RunState, *, base: Base | None = None) -> str | None:
        """Commits a checkpoint and deletes those that are kept no longer. Collective.

        Frozen weights are left out where there is a `base`; one that must be stored and is not there yet is stored first.

        An error is raised on every rank.

        Returns:
            None; if there was no room and the configuration says to go on, why there is no checkpoint.

        Raises:
            DiskFullError: If there is no room and the configuration says to stop then.
            CheckpointError: If the ranks share no folder, or the disk fails.
        """
        try:
            self._save(engine, ema, state, base)
        except DiskFullError as error:
            if self.config.on_full_disk == "stop":
                raise
            _LOG.warning("checkpoint_not_saved update=%d reason=%s", state.clock.updates, error)
            return str(error)
        return None

    def _save(self, engine: Engine, ema: Ema | None, state: RunState, base: Base | None) -> None:
        if base is not None and base.is_stored:
            self._store_base(engine, base.sha256)
        updates, captured = state.clock.updates, capture(engine, ema, base)
        try:
            pending = dist.from_main(lambda: self.store.open_pending(updates, num_bytes=captured.facts.num_bytes()))
            require_shared(pending)
            _write(pending / "engine", captured)
            dist.from_main(lambda: self.store.commit(updates, state))
        except Exception:
            if dist.is_main():
                self.store.discard_pending(updates)
            raise
        dist.from_main(lambda: self._prune(state))

    def _store_base(self, engine: Engine, sha256: str) -> None:
        folder = self.store.folder
        if sha256 in self._stored:
            return
        if dist.from_main(lambda: has_base(folder, sha256)):
            self._stored.add(sha256)
            return
        frozen = engine.capture().only_frozen()
        num_bytes = frozen.facts.num_bytes()
        try:
            pending = dist.from_main(lambda: open_base(folder, sha256, num_bytes=num_bytes))
            require_shared(pending)
            _write(pending / "engine", frozen)
            dist.from_main(lambda: commit_base(folder, sha256))
        except Exception:
            if dist.is_main():
                discard_pending_base(folder, sha256)
            raise
        self._stored.add(sha256)
        _LOG.info("base_stored sha256=%s bytes=%d", sha256, num_bytes)

    def _prune(self, state: RunState) -> None:
        deleted = self.store.prune(state.clock.updates, self.config, self._measure)
        if deleted:
            _LOG.info("checkpoints_deleted names=%s", ",".join(deleted))
        rule, known = self.config.keep_best, state.history.get("before", {})
        if rule is not None and known and rule.metric not in known:
            raise CheckpointError(
                f"checkpoint.keep_best.metric: must be one of {', '.join(sorted(known))}, got {rule.metric}. "
                f"Correct it and resume; update {state.clock.updates} is saved."
            )

    def _measure(self, state: RunState) -> float | None:
        """Returns the measure of `keep_best`; only the checkpoint at the end of a phase has that phase's."""
        rule, phase = self.config.keep_best, state.clock.phase
        if rule is None or phase >= len(self.phase_names):
            return None
        value = state.history.get("phase_metrics", {}).get(self.phase_names[phase], {}).get(rule.metric)
        return float(value) if isinstance(value, int | float) else None


def write_engine(folder: Path, engine: Engine, ema: Ema | None = None, base: Base | None = None) -> None:
    """Writes what `read_engine` needs into an existing folder, each rank its own part. Collective; nothing is committed here.

    Raises:
        DiskFullError: On every rank, if one had no room.
        CheckpointError: On every rank, if one failed otherwise.
    """
    _write(folder, capture(engine, ema, base))


def capture(engine: Engine, ema: Ema | None = None, base: Base | None = None) -> Captured:
    """Returns what this rank writes of engine and average, not copied; without frozen weights where there is a `base`."""
    state = engine.capture()
    if ema is not None:
        state = ema.capture(state)
    return state if base is None else state.on(base)


def read_engine(
    folder: Path, engine: Engine, ema: Ema | None = None, *, origin: str = "the weights that the engine was built with"
) -> EngineFacts:
    """Restores engine and average from what any number of ranks wrote under any ZeRO stage; returns what they were. Collective.

    Args:
        folder: Of the engine, in a checkpoint.
        engine: As it was built: its frozen weights may be those that the checkpoint refers to.
        ema: Its average.
        origin: Of the engine's weights, in words.

    Raises:
        CheckpointError: If `folder` is damaged, or of another model, precision or base.
    """
    with PieceReader(folder) as reader:
        base = reader.facts.base
        if base is not None and not base.is_stored:
            require_start(engine, base, folder=folder, origin=origin)
        engine.restore(reader)
        if ema is not None:
            ema.restore(reader)
        return reader.facts


def require_shared(folder: Path, *, within_seconds: float = _SEEN_WITHIN_SECONDS) -> None:
    """Checks that every rank sees in `folder` what rank 0 writes there. Collective; leaves the folder as it was.

    Args:
        folder: Exists for rank 0.
        within_seconds: How long others look for it.

    Raises:
        CheckpointError: On every rank, if one does not see it.
    """
    if dist.world_size() == 1:
        return
    token = dist.from_main(lambda: _write_token(folder))
    blind = [host for host, sees in dist.gather_objects((socket.gethostname(), _sees(folder, token, within_seconds))) if not sees]
    dist.from_main(lambda: _remove_token(folder))
    if blind:
        raise CheckpointError(
            f"{folder}: must be one folder for all ranks, got {len(blind)} ranks on {', '.join(sorted(set(blind)))} "
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


def _write(folder: Path, state: Captured) -> None:
    """Every rank writes its pieces; an error of one is raised on all."""
    for failure in dist.gather_objects(_failure(lambda: write_pieces(folder, state), folder)):
        if failure is not None:
            raise failure


def _failure(write: Callable[[], None], folder: Path) -> AiprodError | None:
    try:
        write()
    except Exception as error:  # noqa: BLE001  whatever a writer raises, the other ranks must hear of it
        return write_error(error, folder)
    return None
