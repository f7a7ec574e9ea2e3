"""Saving a checkpoint from all ranks: what the ranks must agree on around `CheckpointStore`.

Every rank writes into one folder that rank 0 makes and commits; that it is one for all ranks is found out in
`shared_folder.py`, and what is written is in `engine_files.py`. What may follow what, as a table, is in
`save_states.py`. Called by the loop.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from aiprod_ds.checkpoint.disk import DiskFaultError, explained
from aiprod_ds.checkpoint.frozen_bases import commit_base, discard_pending_base, has_base, open_base
from aiprod_ds.checkpoint.manifest import FileRecord
from aiprod_ds.checkpoint.shard_files import write_shards
from aiprod_ds.checkpoint.staging import StagingBuffer, available_bytes
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import Snapshot
from aiprod_ds.train.resume.background import Background
from aiprod_ds.train.resume.engine_files import capture, gather_records, write_together
from aiprod_ds.train.resume.save_states import SaveEvent, SaveState, next_state
from aiprod_ds.train.resume.shared_folder import require_shared
from aiprod_ds.train.state import TrainState

_LOG = logging.getLogger(__name__)
_ENGINE = "engine"
_USABLE_SHARE = 0.9  # of the memory that a host has left; the rest is for what else grows


@dataclass(slots=True, kw_only=True)
class Saver:
    """Saves and prunes the checkpoints of one run, at most one at a time.

    A save is two pieces of work: every rank writes its own chunks; when all have, rank 0 commits and prunes.
    With `checkpoint.asynchronous` the state is copied to the host first, and the work is done while training
    goes on: `advance` takes it further once all ranks are known to have finished a piece. Without it the same
    work is waited for. Memory for the copies is got beside training too, if `reserve` is called early enough.

    Attributes:
        store: Where to.
        config: What to keep, and what to do without room.
        phase_names: Of the curriculum, by the index that the clock has.
        require_folder: Raises an `OSError` if the run folder is gone, as its mount may be.
        on_not_saved: Called with update and reason when the disk did not take it and the configuration says
            to go on.
        on_replaced: Called with words when a save cannot be asynchronous.
        beside: Small files that every checkpoint gets, by name; the main rank's count.
    """

    store: CheckpointStore
    config: CheckpointConfig
    phase_names: tuple[str, ...]
    require_folder: Callable[[], None] = lambda: None
    on_not_saved: Callable[[int, str], None] = lambda _update, _reason: None
    on_replaced: Callable[[str], None] = lambda _words: None
    beside: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    _stored: set[str] = field(default_factory=set)  # bases that are whole
    _state: SaveState = SaveState.IDLE
    _work: Background = field(default_factory=Background)  # of the state
    _copies: StagingBuffer = field(default_factory=StagingBuffer)
    _saved: RunState = field(init=False, repr=False, compare=False)  # by the save under way or the last one
    _began: float = 0.0

    @property
    def state(self) -> SaveState:
        """What is under way, the same on all ranks."""
        return self._state

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._state in (SaveState.WRITING, SaveState.COMMITTING)

    @property
    def is_reserving(self) -> bool:
        """Whether memory is still being got."""
        return self._state is SaveState.RESERVING and self._work.is_running

    @property
    def finished(self) -> int:
        """Pieces of work that this rank has finished; the least of all ranks is what `advance` wants."""
        return self._work.finished

    def reserve(self, trained: TrainState) -> None:
        """Begins to get the memory that copies of such a state need, beside training; the first save waits
        for it. Collective.

        Does nothing while something is being saved, without memory for the copies, or if copies are not
        wanted.
        """
        if self.config.asynchronous and not self.is_saving:
            self._await_memory()
            captured = capture(trained.engine, trained.ema, trained.base, trained.companion)
            if self._has_memory(captured):
                self._work.start(self._copies.request(captured))
                self._happened(SaveEvent.RESERVE)

    def save(self, trained: TrainState, state: RunState) -> None:
        """Saves, or copies what is to be saved, after the save under way has been finished. Collective.

        Frozen weights are left out where there is a base; one that must be stored and is not there yet is
        stored first.

        An error is raised on every rank, here or later in `advance` and `finish`.

        Args:
            trained: What is written.
            state: What stands beside it: clock, scheduler, history, the adaptive clip's statistics.

        Raises:
            DiskFaultError: If the disk does not take it and the configuration says to stop then.
            CheckpointError: If the ranks share no folder, or something else fails.
        """
        self.finish()
        self._began = time.monotonic()
        with self._going_on_without_room(state):
            self._begin(trained, state)

    def advance(self, finished: int) -> None:
        """Goes on with the save under way if all ranks have finished what was begun. Collective, between
        updates.

        Args:
            finished: The least `finished` of all ranks, the same on all.

        Raises:
            DiskFaultError: As `save`.
            CheckpointError: As `save`.
        """
        if self.is_saving and finished >= self._work.started:
            self._go_on()

    def finish(self) -> None:
        """Waits until nothing is being saved any more. Collective.

        Raises:
            DiskFaultError: As `save`.
            CheckpointError: As `save`.
        """
        while self.is_saving:
            self._go_on()

    def close(self) -> None:
        """Gives memory back; nothing may be under way, unless the run has failed."""
        if not self.is_saving:
            self._await_memory()
            self._copies.release()

    def _happened(self, event: SaveEvent) -> None:
        self._state = next_state(self._state, event)

    @contextmanager
    def _going_on_without_room(self, state: RunState) -> Iterator[None]:
        updates = state.clock.updates
        try:
            yield
        except Exception as error:
            self._happened(SaveEvent.FAILED)
            if dist.is_main():
                self.store.discard_pending(updates)
            if not isinstance(error, DiskFaultError) or self.config.on_full_disk == "stop":
                raise
            _LOG.warning("checkpoint_not_saved update=%d reason=%s", updates, error)
            self.on_not_saved(updates, str(error))

    def _begin(self, trained: TrainState, state: RunState) -> None:
        """Starts the writing, and waits for all of the save if nothing was copied."""
        engine, base = trained.engine, trained.base
        dist.from_main(self._require_folder)  # before the store makes one beside a mount that is gone
        if base is not None and base.is_stored:
            self._store_base(engine, base.sha256)
        self._await_memory()
        updates, captured = state.clock.updates, capture(engine, trained.ema, base, trained.companion)
        pending = dist.from_main(
            lambda: self.store.open_pending(updates, num_bytes=captured.facts.num_bytes())
        )
        require_shared(pending)
        is_copied = self.config.asynchronous and self._has_memory(captured)
        if is_copied:
            captured = self._copies.take(captured)
        elif engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)  # another thread's stream knows nothing of this one's
        self._saved = state
        self._work.start(lambda: write_shards(pending / _ENGINE, captured))
        self._happened(SaveEvent.SAVE)
        if not is_copied:
            self.finish()

    def _require_folder(self) -> None:
        with explained(self.store.folder):
            self.require_folder()

    def _go_on(self) -> None:
        """Waits for the work of this state on all ranks and begins that of the next, if it has any."""
        state = self._saved
        with self._going_on_without_room(state):
            if self._state is SaveState.WRITING:
                known = gather_records(self._work.result, self.store.pending_folder(state.clock.updates))
                self._work.start(partial(self._commit, state, known) if dist.is_main() else _nothing)
            else:
                if not dist.is_main():
                    self._work.result()
                dist.from_main(self._work.result)
            self._happened(SaveEvent.DONE)

    def _commit(self, state: RunState, known: Mapping[str, FileRecord]) -> None:
        updates = state.clock.updates
        written = {f"{_ENGINE}/{name}": record for name, record in known.items()}
        self.store.commit(updates, state, written, beside=self.beside)
        _LOG.info("checkpoint_committed update=%d seconds=%.2f", updates, time.monotonic() - self._began)
        try:
            self._prune(state)
        except DiskFaultError as error:
            if self.config.on_full_disk == "stop":
                raise
            _LOG.warning("checkpoints_not_deleted update=%d reason=%s", updates, error)

    def _await_memory(self) -> None:
        if self._state is SaveState.RESERVING:
            self._work.result()
            self._happened(SaveEvent.DONE)

    def _has_memory(self, captured: Snapshot) -> bool:
        """Returns whether every host has room for the copies of its ranks; tells once if one has not.
        Collective."""
        reports = dist.gather_objects(
            (socket.gethostname(), self._copies.missing_bytes(captured), available_bytes())
        )
        for host in sorted({host for host, _, _ in reports}):
            needed = sum(missing for name, missing, _ in reports if name == host)
            available = min(available for name, _, available in reports if name == host)
            if needed > available * _USABLE_SHARE:
                words = (
                    f"checkpoints are saved while training waits: host {host} has {available:,} bytes of "
                    "memory left and the "
                    f"copies for checkpoint.asynchronous take {needed:,}"
                )
                self.on_replaced(words)
                return False
        return True

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
            write_together(pending / _ENGINE, frozen)
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
        """Returns the measure of `keep_best` if it was taken at the checkpoint's own updates."""
        rule, phase, history = self.config.keep_best, state.clock.phase, state.history
        if rule is None or phase >= len(self.phase_names):
            return None
        measured = history.get("measured") or {}
        if measured.get("updates") == state.clock.updates:
            metrics = measured["metrics"]
        else:  # of a checkpoint from before evaluations inside phases: one at the end of a phase has its
            metrics = history.get("phase_metrics", {}).get(self.phase_names[phase], {})
        value = metrics.get(rule.metric)
        return float(value) if isinstance(value, int | float) else None


def _nothing() -> None:
    """What ranks other than the main one do while it commits."""
