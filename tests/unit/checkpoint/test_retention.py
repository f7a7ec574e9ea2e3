"""What is kept of a run's checkpoints, and what happens without room: the choice, the deletion, the
configuration."""

from __future__ import annotations

import errno
import logging
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from aiprod_ds.checkpoint.disk import DiskFullError, write_error
from aiprod_ds.checkpoint.retention import Standing, surplus
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.snapshot import Chunk, EngineFacts, Snapshot, TensorMetadata
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState

Usage = namedtuple("Usage", "total used free")
BEST = {"metric": "psnr_db", "mode": "max"}


def _config(**values: Any) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"every_updates": 1, **values})


def _standing(values: dict[int, float | None]) -> list[Standing]:
    return [
        Standing(name=str(updates), updates=updates, value=values[updates])
        for updates in sorted(values, reverse=True)
    ]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [8, 7, 6, 5, 4]),
        ({"keep_last": 1}, [8]),
        ({"keep_last": 9}, [8, 7, 6, 5, 4]),
        ({"keep_last": 2, "keep_every_updates": 4}, [8, 7, 4]),
        ({"keep_last": 1, "keep_best": BEST}, [8, 5]),
        ({"keep_last": 1, "keep_best": {**BEST, "count": 2}}, [8, 7, 5]),
        ({"keep_last": 1, "keep_best": {**BEST, "mode": "min"}}, [8, 4]),
    ],
)
def test_the_rules_add_up(rules: dict[str, Any], kept: list[int]) -> None:
    """5 is the best, 7 the second, 4 the lowest; 6 was measured as NaN and 8 not at all."""
    standing = _standing({8: None, 7: 2.0, 6: math.nan, 5: 3.0, 4: 1.0})
    deleted = surplus(standing, _config(**rules))
    assert [entry.updates for entry in standing if entry.name not in deleted] == kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_every_updates": 2}, "keep_every_updates: has no effect without keep_last"),
        ({"keep_best": BEST}, "keep_best: has no effect without keep_last"),
        (
            {"keep_last": 1, "every_updates": 2, "keep_every_updates": 3},
            "must be a multiple of every_updates",
        ),
        ({"keep_last": 0}, "keep_last: must be >= 1, got 0"),
    ],
)
def test_rules_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**values)


class SmallEngine:
    """One tensor and the error that a test gives it; the parts of an engine that saving uses."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.device = torch.device("cpu")

    def capture(self) -> Snapshot:
        return FailingCapture(
            rank=0,
            facts=EngineFacts(
                engine="local",
                zero_stage=0,
                precision="fp32",
                world_size=1,
                adam_steps={},
                tensors={"buffer/x": TensorMetadata(shape=(10,), dtype="float32")},
            ),
            tensors=(torch.ones(10),),
            chunks=(Chunk(kind="buffer", name="x", tensor=0, start=0, offset=0, length=10),),
            error=self.error,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingCapture(Snapshot):
    """Its chunks end in an error, as a disk does while they are written."""

    error: Exception | None

    def chunk_values(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        yield self.chunks[0], self.tensors[0]
        if self.error is not None:
            raise self.error


def _state(updates: int, *, phase: int = 0, measures: dict[str, Any] | None = None) -> RunState:
    history = {"before": {"psnr_db": 1.0}, "phase_metrics": measures or {}}
    own = 0 if phase else updates
    clock = Clock(updates=updates, phase=phase, phase_updates=own, micro_batches=updates, samples=updates)
    return RunState(
        clock=clock, scheduler={}, fingerprint="f", phase_fingerprints=("p", "q"), layout={}, history=history
    )


def _saver(folder: Path, **values: Any) -> Saver:
    names = ("low", "high")
    return Saver(store=CheckpointStore(folder / "checkpoints"), config=_config(**values), phase_names=names)


def _save(
    saver: Saver, updates: int, *, engine: SmallEngine | None = None, **state: Any
) -> list[tuple[int, str]]:
    """Returns what was not saved."""
    found: list[tuple[int, str]] = []
    saver.on_not_saved = lambda update, reason: found.append((update, reason))
    saver.save(TrainState(engine=cast("Engine", engine or SmallEngine())), _state(updates, **state))
    saver.finish()
    return found


def test_the_best_is_the_one_at_the_end_of_the_phase_that_was_measured(tmp_path: Path) -> None:
    saver = _saver(tmp_path, keep_last=1, keep_best=BEST)
    low = {"low": {"psnr_db": 30.0}}
    _save(saver, 1)
    _save(saver, 2, measures=low)
    _save(saver, 3, phase=1, measures=low)
    _save(saver, 4, phase=1, measures={**low, "high": {"psnr_db": 20.0}})
    _save(saver, 5, phase=1, measures={**low, "high": {"psnr_db": 20.0}})
    assert saver.store.names() == ["update_000005", "update_000002"]


def test_damaged_and_later_ones_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for updates in (1, 2, 3, 9):
        _save(_saver(tmp_path), updates)
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.folder / "update_000003" / "engine" / "engine.json").write_bytes(b"")
    _save(_saver(tmp_path, keep_last=2), 4)
    assert store.names() == ["update_000009", "update_000004", "update_000003", "update_000002"]


def test_a_wrong_measure_is_told_once_the_checkpoint_is_saved(tmp_path: Path) -> None:
    saver = _saver(tmp_path, keep_last=1, keep_best={**BEST, "metric": "psnr"})
    with pytest.raises(CheckpointError, match=r"keep_best\.metric: must be one of psnr_db, got psnr"):
        _save(saver, 1)
    assert saver.store.names() == ["update_000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_full_disk", ["stop", "go_on"])
@pytest.mark.parametrize("when", ["before", "while writing"])
def test_without_room_the_run_stops_or_goes_on_and_the_old_one_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_full_disk: str,
    when: str,
    asynchronous: bool,
) -> None:
    saver = _saver(tmp_path, on_full_disk=on_full_disk, asynchronous=asynchronous)
    _save(saver, 1)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    engine = SmallEngine(
        error=OSError(errno.ENOSPC, "No space left on device") if when == "while writing" else None
    )
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if when == "before":
            patch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 999, 1))
        if on_full_disk == "stop":
            with pytest.raises(DiskFullError, match=r"lower checkpoint\.keep_last"):
                _save(saver, 2, engine=engine)
        else:
            [(update, reason)] = _save(saver, 2, engine=engine)
            assert update == 2
            assert re.search(r"lower checkpoint\.keep_last", reason)
            assert "checkpoint_not_saved update=2" in caplog.text
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    _save(saver, 3)
    assert saver.store.names() == ["update_000003", "update_000001"]


@pytest.mark.parametrize(("free", "fits"), [(43, False), (44, True)])
def test_a_save_needs_room_for_its_tensors_and_a_tenth_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """Closed form: 10 numbers in fp32 are 40 bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 0, free))
    if fits:
        _save(_saver(tmp_path), 1)
    else:
        with pytest.raises(DiskFullError, match="must have 44 bytes free"):
            _save(_saver(tmp_path), 1)
    assert bool(CheckpointStore(tmp_path / "checkpoints").names()) is fits


def test_a_writer_that_only_has_words_is_understood_by_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert not isinstance(write_error(error, tmp_path), DiskFullError)
    worded = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert isinstance(write_error(worded, tmp_path), DiskFullError)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000, 0))
    assert isinstance(write_error(error, tmp_path / "not" / "there"), DiskFullError)
    assert not isinstance(write_error(PermissionError(errno.EACCES, "no"), tmp_path), DiskFullError)


@pytest.mark.parametrize(
    ("doubtful", "kept"),
    [((), {"8"}), ((8,), {"8", "7"}), ((8, 7, 6), {"8", "5"}), ((8, 7, 6, 5), {"8"})],
)
def test_one_that_no_spike_can_reach_is_kept(doubtful: tuple[int, ...], kept: set[str]) -> None:
    standing = [
        Standing(name=str(updates), updates=updates, is_doubtful=updates in doubtful)
        for updates in (8, 7, 6, 5)
    ]
    gone = surplus(standing, _config(keep_last=1))
    assert {entry.name for entry in standing} - set(gone) == kept
