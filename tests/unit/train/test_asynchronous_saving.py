"""Saves beside training: they hold the state of the moment they were asked for, one at a time, and tell of
errors later.

One rank with the local engine. What two ranks do is in tests/resume/test_signals.py, where runs that save so
are killed.
"""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiprod_ds.checkpoint import staging
from aiprod_ds.checkpoint.disk import DiskFullError
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
from aiprod_ds.errors import CheckpointError
from aiprod_ds.train.resume import saver as saving
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState

Usage = namedtuple("Usage", "total used free")


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


def _saver(folder: Path, **config: Any) -> Saver:
    config = {"asynchronous": True, **config}
    return Saver(
        store=CheckpointStore(folder / "checkpoints"),
        config=CheckpointConfig(**config),
        phase_names=("only",),
    )


def _state(updates: int) -> RunState:
    return RunState(
        clock=Clock(updates=updates, phase_updates=updates, micro_batches=updates, samples=updates),
        scheduler={},
        fingerprint="f",
        phase_fingerprints=("p",),
        layout={"world_size": 1},
    )


def _set(engine: LocalEngine, value: float) -> None:
    engine.write_values([("weight", torch.full((2, 3), value)), ("bias", torch.full((2,), value))])


def _saved(saver: Saver) -> tuple[int, float]:
    """Returns the update and the value of the newest checkpoint, whose hashes are compared."""
    newest = saver.store.newest()
    assert newest is not None
    with ShardReader(newest.engine_folder) as reader:
        values = torch.cat([reader.whole("master", "weight").reshape(-1), reader.whole("master", "bias")])
    assert values.unique().numel() == 1, "of one moment"
    return newest.state.clock.updates, float(values[0])


def test_what_is_saved_is_of_the_moment_it_was_asked_for(engine: LocalEngine, tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    for update in (1, 2):  # the second time into the same memory
        _set(engine, float(update))
        saver.save(TrainState(engine=engine), _state(update))
        _set(engine, -1.0)
        assert saver.is_saving
        saver.finish()
        assert not saver.is_saving
        assert _saved(saver) == (update, float(update))
    saver.close()


def test_boundaries_take_it_further_and_never_before_all_have_finished(
    engine: LocalEngine, tmp_path: Path
) -> None:
    saver = _saver(tmp_path)
    _set(engine, 1.0)
    saver.save(TrainState(engine=engine), _state(1))
    saver.advance(0)
    assert saver.store.names() == []
    while saver.is_saving:
        saver.advance(saver.finished)
    assert _saved(saver) == (1, 1.0)


def test_the_next_save_waits_for_the_one_under_way(engine: LocalEngine, tmp_path: Path) -> None:
    saver = _saver(tmp_path)
    for update in (1, 2, 3):
        _set(engine, float(update))
        saver.save(TrainState(engine=engine), _state(update))
        assert saver.store.names() == [f"update_{number:06d}" for number in range(update - 1, 0, -1)]
    saver.finish()
    assert _saved(saver) == (3, 3.0)


@pytest.mark.parametrize("on_full_disk", ["stop", "go_on"])
def test_an_error_of_the_writer_comes_at_a_boundary_and_the_old_one_stays(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_full_disk: str
) -> None:
    saver, history = _saver(tmp_path, on_full_disk=on_full_disk), History()
    saver.on_not_saved = history.note_not_saved
    _set(engine, 1.0)
    saver.save(TrainState(engine=engine), _state(1))
    saver.finish()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_shards", fail)
        saver.save(TrainState(engine=engine), _state(2))
        if on_full_disk == "stop":
            with pytest.raises(DiskFullError, match=r"lower checkpoint\.keep_last"):
                saver.finish()
        else:
            saver.finish()
            assert [entry["update"] for entry in history.not_saved] == [2]
    assert _saved(saver) == (1, 1.0)
    assert [path.name for path in saver.store.folder.iterdir() if path.name != "latest"] == ["update_000001"]
    _set(engine, 3.0)
    saver.save(TrainState(engine=engine), _state(3))
    saver.finish()
    assert _saved(saver) == (3, 3.0)


def test_a_full_disk_is_found_before_anything_is_copied(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 999, 1))
    saver = _saver(tmp_path)
    with pytest.raises(DiskFullError):
        saver.save(TrainState(engine=engine), _state(1))
    assert not saver.is_saving


def test_without_memory_for_the_copies_training_waits_and_the_report_says_so_once(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "available_bytes", lambda: 0)
    saver, history = _saver(tmp_path), History()
    saver.on_replaced = history.note_replacement
    for update in (1, 2):
        _set(engine, float(update))
        with caplog.at_level(logging.WARNING):
            saver.save(TrainState(engine=engine), _state(update))
        assert not saver.is_saving
        assert _saved(saver) == (update, float(update))
    [words] = history.replacements
    assert words.startswith("checkpoints are saved while training waits: host ")
    assert caplog.text.count("replaced checkpoints are saved while training waits") == 1


def test_copies_are_apart_from_what_they_copy_and_use_the_same_memory(engine: LocalEngine) -> None:
    copies, captured = StagingBuffer(), engine.capture()
    needed = copies.missing_bytes(captured)
    assert needed >= sum(tensor.nbytes for tensor in captured.tensors)
    first = copies.take(captured)
    assert copies.missing_bytes(captured) == 0
    assert copies.take(captured).tensors[0].data_ptr() == first.tensors[0].data_ptr()
    for copy, tensor in zip(first.tensors, captured.tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() != tensor.data_ptr()
    assert first.chunks == captured.chunks
    copies.release()
    assert copies.missing_bytes(captured) == needed


def test_memory_is_got_before_the_first_save_and_once(
    engine: LocalEngine, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, logger=staging.__name__)
    saver = _saver(tmp_path)
    for update in (1, 2):
        saver.reserve(TrainState(engine=engine))
        _set(engine, float(update))
        saver.save(TrainState(engine=engine), _state(update))
        saver.reserve(TrainState(engine=engine))  # the memory is in use
        _set(engine, -1.0)
        saver.finish()
        assert _saved(saver) == (update, float(update))
    assert len([record for record in caplog.records if "staging" in record.getMessage()]) == 1
    saver.close()


def test_no_memory_is_got_where_nothing_is_copied(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = _saver(tmp_path, asynchronous=False)
    saver.reserve(TrainState(engine=engine))
    assert not saver.is_reserving
    monkeypatch.setattr(saving, "available_bytes", lambda: 0)
    short, told = _saver(tmp_path), []
    short.on_replaced = told.append
    short.reserve(TrainState(engine=engine))
    assert not short.is_reserving
    assert len(told) == 1


def test_this_machine_tells_what_memory_is_left() -> None:
    assert 0 < staging.available_bytes() < 1 << 50


def test_a_file_that_is_shorter_than_its_writer_says_is_not_committed(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that loses what another node wrote."""
    write = saving.write_shards

    def lose(folder: Path, state: Any) -> Any:
        written = write(folder, state)
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        return written

    monkeypatch.setattr(saving, "write_shards", lose)
    saver = _saver(tmp_path)
    saver.save(TrainState(engine=engine), _state(1))
    with pytest.raises(CheckpointError, match=r"must have the \d+ bytes that were written"):
        saver.finish()
    assert saver.store.names() == []
