"""Every state of saving and all that can happen in it: the transitions that follow, the state after them, the
error, and the checkpoint that stands in the end.

One rank with the local engine and real files. Work waits at a gate, so that a state lasts as long as a test
needs it. What calls look like from outside is in test_asynchronous_saving.py.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiprod_ds.checkpoint import staging, store
from aiprod_ds.checkpoint.disk import DiskFaultError, DiskFullError
from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.staging import StagingBuffer
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.train.resume import saver as saving
from aiprod_ds.train.resume.background import Background
from aiprod_ds.train.resume.save_states import SaveEvent, SaveState, next_state
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState

OLD, UNDER_WAY, NEXT, LATER = (
    1,
    2,
    3,
    4,
)  # updates: there before, saved when the event comes, saved by it, after
PATIENCE_SECONDS = 30.0


class Event(Enum):
    """What can happen to a saver from outside."""

    RESERVE = "reserve"
    SAVE = "save"
    BOUNDARY = "boundary, some rank still works"
    ALL_FINISHED = "boundary, the work is finished on all ranks"
    FINISH = "finish"
    FAILURE = "the disk fails, or without any the next save"
    FULL_DISK_STOPS = "the disk is full, on_full_disk: stop"
    FULL_DISK_GOES_ON = "the disk is full, on_full_disk: go_on"
    CLOSE = "close"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is expected of one event in one state.

    Attributes:
        path: The transitions, as `SaveEvent` has them.
        then: The state after them.
        raises: What the caller gets.
        stands: The newest checkpoint once nothing is under way.
    """

    path: str
    then: SaveState
    raises: type[Exception] | None = None
    stands: int


IDLE, RESERVING = SaveState.IDLE, SaveState.RESERVING
WRITING, COMMITTING = SaveState.WRITING, SaveState.COMMITTING
SAVING = (WRITING, COMMITTING)
ERRORS = {
    Event.FAILURE: errno.EIO,
    Event.FULL_DISK_STOPS: errno.ENOSPC,
    Event.FULL_DISK_GOES_ON: errno.ENOSPC,
}

ASYNCHRONOUS = {
    (IDLE, Event.RESERVE): Row(path="reserve", then=RESERVING, stands=OLD),
    (IDLE, Event.SAVE): Row(path="save", then=WRITING, stands=NEXT),
    (IDLE, Event.BOUNDARY): Row(path="", then=IDLE, stands=OLD),
    (IDLE, Event.ALL_FINISHED): Row(path="", then=IDLE, stands=OLD),
    (IDLE, Event.FINISH): Row(path="", then=IDLE, stands=OLD),
    (IDLE, Event.FAILURE): Row(path="failed", then=IDLE, raises=DiskFaultError, stands=OLD),
    (IDLE, Event.FULL_DISK_STOPS): Row(path="failed", then=IDLE, raises=DiskFullError, stands=OLD),
    (IDLE, Event.FULL_DISK_GOES_ON): Row(path="failed", then=IDLE, stands=OLD),
    (IDLE, Event.CLOSE): Row(path="", then=IDLE, stands=OLD),
    (RESERVING, Event.RESERVE): Row(path="done reserve", then=RESERVING, stands=OLD),
    (RESERVING, Event.SAVE): Row(path="done save", then=WRITING, stands=NEXT),
    (RESERVING, Event.BOUNDARY): Row(path="", then=RESERVING, stands=OLD),
    (RESERVING, Event.ALL_FINISHED): Row(path="", then=RESERVING, stands=OLD),
    (RESERVING, Event.FINISH): Row(path="", then=RESERVING, stands=OLD),
    (RESERVING, Event.FAILURE): Row(path="failed", then=RESERVING, raises=MemoryError, stands=OLD),
    (RESERVING, Event.FULL_DISK_STOPS): Row(path="done failed", then=IDLE, raises=DiskFullError, stands=OLD),
    (RESERVING, Event.FULL_DISK_GOES_ON): Row(path="done failed", then=IDLE, stands=OLD),
    (RESERVING, Event.CLOSE): Row(path="done", then=IDLE, stands=OLD),
    (WRITING, Event.RESERVE): Row(path="", then=WRITING, stands=UNDER_WAY),
    (WRITING, Event.SAVE): Row(path="done done save", then=WRITING, stands=NEXT),
    (WRITING, Event.BOUNDARY): Row(path="", then=WRITING, stands=UNDER_WAY),
    (WRITING, Event.ALL_FINISHED): Row(path="done", then=COMMITTING, stands=UNDER_WAY),
    (WRITING, Event.FINISH): Row(path="done done", then=IDLE, stands=UNDER_WAY),
    (WRITING, Event.FAILURE): Row(path="failed", then=IDLE, raises=DiskFaultError, stands=OLD),
    (WRITING, Event.FULL_DISK_STOPS): Row(path="failed", then=IDLE, raises=DiskFullError, stands=OLD),
    (WRITING, Event.FULL_DISK_GOES_ON): Row(path="failed", then=IDLE, stands=OLD),
    (WRITING, Event.CLOSE): Row(path="", then=WRITING, stands=UNDER_WAY),
    (COMMITTING, Event.RESERVE): Row(path="", then=COMMITTING, stands=UNDER_WAY),
    (COMMITTING, Event.SAVE): Row(path="done save", then=WRITING, stands=NEXT),
    (COMMITTING, Event.BOUNDARY): Row(path="", then=COMMITTING, stands=UNDER_WAY),
    (COMMITTING, Event.ALL_FINISHED): Row(path="done", then=IDLE, stands=UNDER_WAY),
    (COMMITTING, Event.FINISH): Row(path="done", then=IDLE, stands=UNDER_WAY),
    (COMMITTING, Event.FAILURE): Row(path="failed", then=IDLE, raises=DiskFaultError, stands=OLD),
    (COMMITTING, Event.FULL_DISK_STOPS): Row(path="failed", then=IDLE, raises=DiskFullError, stands=OLD),
    (COMMITTING, Event.FULL_DISK_GOES_ON): Row(path="failed", then=IDLE, stands=OLD),
    (COMMITTING, Event.CLOSE): Row(path="", then=COMMITTING, stands=UNDER_WAY),
}
# A save that is waited for is over when the call returns, or an interrupt has left it where it was. It
# reserves nothing, so RESERVING is out of reach. All else is as beside training.
SYNCHRONOUS = {
    **{key: row for key, row in ASYNCHRONOUS.items() if key[0] is not RESERVING},
    (IDLE, Event.RESERVE): Row(path="", then=IDLE, stands=OLD),
    (IDLE, Event.SAVE): Row(path="save done done", then=IDLE, stands=NEXT),
    (WRITING, Event.SAVE): Row(path="done done save done done", then=IDLE, stands=NEXT),
    (COMMITTING, Event.SAVE): Row(path="done save done done", then=IDLE, stands=NEXT),
}
MODES = {"asynchronous": ASYNCHRONOUS, "synchronous": SYNCHRONOUS}
CASES = [
    pytest.param(mode, state, event, id=f"{mode}: {state.value}: {event.value}")
    for mode, state, event in product(MODES, SaveState, Event)
    if (mode, state) != ("synchronous", RESERVING)
]


class Gate:
    """Holds work back until it is opened, and lets it fail.

    Attributes:
        error: What work raises in place of being done.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._is_open = threading.Event()
        self._is_open.set()

    def open(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        self._is_open.clear()

    def before(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `work` as it is done behind the gate."""

        def held(*arguments: Any) -> Any:
            assert self._is_open.wait(PATIENCE_SECONDS), "the test opens it"
            return self.failing(work)(*arguments)

        return held

    def failing(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `work` as it fails with `error`, but is not held back."""

        def done(*arguments: Any) -> Any:
            if self.error is not None:
                raise self.error
            return work(*arguments)

        return done


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What a saver does in its thread stands behind it; the first question to the disk only fails with it."""
    made, request = Gate(), StagingBuffer.request
    monkeypatch.setattr(StagingBuffer, "request", lambda copies, state: made.before(request(copies, state)))
    monkeypatch.setattr(saving, "write_shards", made.before(saving.write_shards))
    monkeypatch.setattr(store, "write_manifest", made.before(store.write_manifest))
    monkeypatch.setattr(shutil, "disk_usage", made.failing(shutil.disk_usage))
    yield made
    made.open()


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine(
        nn.Linear(3, 2),
        [ParameterGroup(names=("weight", "bias"), is_decayed=True)],
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings({"zero_optimization": {"stage": 0}}, where="test"),
        micro_batch_size=1,
        accumulation=1,
    )
    yield made
    made.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A saver that is brought into a state, and what happens to it there."""

    saver: Saver
    engine: LocalEngine
    gate: Gate

    def enter(self, state: SaveState) -> None:
        """Brings the saver into `state`, its work held back at the gate."""
        self.save(OLD)
        self.saver.finish()
        if state is RESERVING:
            self.gate.close()
            self.reserve()
        elif state in SAVING and self.saver.config.asynchronous:
            self.gate.close()
            self.save(UNDER_WAY)
            if state is COMMITTING:
                self.await_work()
                self.gate.close()
                self.saver.advance(self.saver.finished)
        elif state in SAVING:
            self._save_until_interrupted(at=state)
        assert self.saver.state is state

    def happen(self, event: Event) -> None:
        """Lets `event` happen; the gate stays closed where the saver must not wait for what is behind it."""
        saving = self.saver.is_saving
        goes_on = {Event.RESERVE: saving, Event.BOUNDARY: True, Event.FINISH: not saving, Event.CLOSE: saving}
        if not goes_on.get(event, False):
            self._let_work_end(event)
        if event is Event.RESERVE:
            self.reserve()
        elif event in (Event.BOUNDARY, Event.ALL_FINISHED):
            self.saver.advance(self.saver.finished)
        elif event is Event.CLOSE:
            self.saver.close()
        elif event is Event.SAVE or (event in ERRORS and not self.saver.is_saving):
            self.save(NEXT)
        else:
            self.saver.finish()

    def save(self, updates: int) -> None:
        state = RunState(
            clock=Clock(updates=updates, phase_updates=updates, micro_batches=updates, samples=updates),
            scheduler={},
            fingerprint="f",
            phase_fingerprints=("p",),
            layout={"world_size": 1},
        )
        self.engine.write_values([("bias", torch.full((2,), float(updates)))])
        self.saver.save(TrainState(engine=self.engine), state)

    def reserve(self) -> None:
        self.saver.reserve(TrainState(engine=self.engine))

    def await_work(self) -> None:
        before, deadline = self.saver.finished, time.monotonic() + PATIENCE_SECONDS
        self.gate.open()
        while self.saver.finished == before:
            assert time.monotonic() < deadline, "the work ends"
            time.sleep(0.001)

    def newest(self) -> int:
        """Returns the update of the newest checkpoint, which is whole and holds what was there at it."""
        checkpoint = self.saver.store.newest()
        assert checkpoint is not None
        with ShardReader(checkpoint.engine_folder) as reader:
            values = reader.whole("master", "bias").tolist()
        updates = checkpoint.state.clock.updates
        assert values == [updates, updates]
        return updates

    def _let_work_end(self, event: Event) -> None:
        is_memory = self.saver.state is RESERVING
        if event is Event.ALL_FINISHED and self.saver.state is not IDLE:
            self.await_work()
        elif event is Event.FAILURE and is_memory:
            self.gate.error = MemoryError("injected")
        elif event in ERRORS:
            if is_memory:  # it is got: the disk is what fails
                self.await_work()
            self.gate.error = OSError(ERRORS[event], "injected")
        self.gate.open()

    def _save_until_interrupted(self, *, at: SaveState) -> None:
        """As a second signal ends a run, or Ctrl+C: while a save waits for its work."""
        wait = Background.result

        def interrupted(work: Background) -> Any:
            if self.saver.state is at:
                raise KeyboardInterrupt
            self.gate.open()
            ended = wait(work)
            self.gate.close()
            return ended

        self.gate.close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Background, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.save(UNDER_WAY)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "state", "event"), CASES)
def test_what_happens_in_a_state_leads_where_the_table_says(
    engine: LocalEngine,
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    state: SaveState,
    event: Event,
) -> None:
    row, not_saved, path = MODES[mode][state, event], [], []
    on_full_disk = "go_on" if event is Event.FULL_DISK_GOES_ON else "stop"
    config = CheckpointConfig(asynchronous=mode == "asynchronous", on_full_disk=on_full_disk)
    saver = Saver(
        store=CheckpointStore(tmp_path / "checkpoints"),
        config=config,
        phase_names=("only",),
        on_not_saved=lambda update, _: not_saved.append(update),
    )
    bench = Bench(saver=saver, engine=engine, gate=gate)

    def noted(before: SaveState, happened: SaveEvent) -> SaveState:
        path.append(happened.value)
        return next_state(before, happened)

    bench.enter(state)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "next_state", noted)
        raised = _raised(lambda: bench.happen(event))
    assert path == row.path.split()
    assert saver.state is row.then
    assert raised is row.raises
    assert not_saved == ([UNDER_WAY if state in SAVING else NEXT] if on_full_disk == "go_on" else [])

    gate.error = None
    gate.open()
    saver.finish()
    assert bench.newest() == row.stands
    assert not list(saver.store.folder.glob("*.pending"))
    if row.raises is MemoryError:  # whoever waits for the memory hears of it, each time
        assert _raised(saver.close) is MemoryError
        return
    caplog.clear()  # another test may have left a level that shows what came before
    with caplog.at_level(logging.INFO, logger=staging.__name__):
        bench.save(LATER)
    is_given_back = event is Event.CLOSE and state not in SAVING and config.asynchronous
    assert caplog.text.count("staging bytes=") == is_given_back, "else the memory is used again"
    saver.finish()
    assert bench.newest() == LATER
    saver.close()
    assert saver.state is IDLE


@pytest.mark.parametrize(("state", "event"), list(product(SaveState, SaveEvent)))
def test_a_transition_is_one_that_a_saver_makes_or_is_refused(state: SaveState, event: SaveEvent) -> None:
    """Those of the rows above, which are made there; all others would be an error in the saver."""
    made = set()
    for (before, _), row in (item for rows in MODES.values() for item in rows.items()):
        now = before
        for step in map(SaveEvent, row.path.split()):
            made.add((now, step))
            now = next_state(now, step)
        assert now is row.then
    assert event in {happened for _, happened in made}
    if (state, event) in made:
        assert isinstance(next_state(state, event), SaveState)
    else:
        with pytest.raises(AssertionError, match=f"^{event.value} cannot happen while {state.value}$"):
            next_state(state, event)


def test_work_is_refused_while_other_work_runs(gate: Gate) -> None:
    gate.close()
    work = Background()
    work.start(gate.before(lambda: "done"))
    with pytest.raises(AssertionError, match="one at a time"):
        work.start(lambda: None)
    gate.open()
    assert work.result() == "done"
    assert (work.started, work.finished, work.is_running) == (1, 1, False)


def _raised(call: Callable[[], None]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001  whatever it is, the table knows it
        return type(error)
    return None
