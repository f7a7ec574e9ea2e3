"""A save that is interrupted before any of its file operations leaves the old checkpoint or the new one,
whole.

Every operation below the store's folder is counted by wrapping the calls of `os` and `open` that Python code
makes, and the count is held against the interpreter's own audit events. Then each in turn does not happen:
the process is killed (nothing after it happens either), the call fails once, or the disk is full. Oracle: the
bytes that were saved under either name.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiprod_ds.checkpoint.disk import DiskFullError
from aiprod_ds.checkpoint.frozen_bases import commit_base, discard_pending_base, has_base, open_base
from aiprod_ds.checkpoint.manifest import write_manifest
from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.run import CheckpointConfig
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.errors import CheckpointError
from aiprod_ds.snapshot import Base
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState

BESIDE = {"clips.jsonl.gz": b"the clips of the run"}
KEEP_TWO = CheckpointConfig(keep_last=2)
# Scenario -> checkpoints that stand before, update that is saved, file operations of the save. The count may
# only change with the commit protocol: fewer would mean that operations are no longer seen.
SCENARIOS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "first": ((), 4, 41),
    "next": ((2,), 4, 44),
    "same name": ((2,), 2, 53),
    "deletes two": ((1, 2, 3), 4, 72),
}
WHOLE_SAVE_OPERATIONS = 79  # the file of moments and the deletion of the oldest included
_NAMES = ("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")
_AUDITED = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}


@pytest.fixture(autouse=True)
def _without_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes most of the time, and a test cannot see what it does to the disk, only that it is asked
    for."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class KilledError(BaseException):
    """The process ends here: no handler runs any further operation."""


class Faults:
    """Counts file operations below a folder and lets one of them fail.

    Args:
        folder: Others are left alone.
        at: Number of the operation that does not happen; None: all do.
        error: What it raises; after `KilledError` every later operation raises it too.
        writes_only: Whether only writes count.
    """

    def __init__(
        self,
        folder: Path,
        *,
        at: int | None = None,
        error: BaseException | None = None,
        writes_only: bool = False,
    ) -> None:
        self.seen: list[tuple[str, str]] = []
        self._folder, self._at, self._error, self._writes_only = folder, at, error, writes_only

    def meet(self, name: str, path: object) -> None:
        if not self.concerns(path) or (self._writes_only and name != "write"):
            return
        number = len(self.seen)
        self.seen.append((name, str(path)))
        if self._error is not None and (
            number == self._at or (number > (self._at or 0) and isinstance(self._error, KilledError))
        ):
            raise self._error

    def concerns(self, path: object) -> bool:
        return str(path).startswith(str(self._folder))


class _Watched:
    """A file opened for writing whose writes and closing are operations of their own."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        self._faults.meet("write", self._file.name)
        written: int = self._file.write(data)
        return written

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _watching(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> Iterator[None]:
    descriptors: dict[int, str] = {}
    own_open, own_os_open = io.open, os.open

    def path_of(target: Any, options: dict[str, Any]) -> str:
        if isinstance(target, int):
            return descriptors.get(target, "")
        folder = descriptors.get(options.get("dir_fd") or -1, "")
        return os.path.join(folder, os.fspath(target))  # noqa: PTH118  as the call has it

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(target: Any, *arguments: Any, **options: Any) -> Any:
            path = path_of(target, options)
            faults.meet(name, path)
            result = call(target, *arguments, **options)
            if name == "open":
                descriptors[result] = path
            return result

        return wrapper

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        faults.meet("open", file)
        opened = own_open(file, mode, *arguments, **options)
        if "r" in mode or not faults.concerns(file):
            return opened
        descriptors[opened.fileno()] = str(file)
        return _Watched(opened, faults)

    with monkeypatch.context() as patch:
        for name in _NAMES:
            patch.setattr(os, name, watched(name, own_os_open if name == "open" else getattr(os, name)))
        patch.setattr(io, "open", open_file)
        patch.setattr(builtins, "open", open_file)
        yield


def _state(updates: int) -> RunState:
    clock = Clock(updates=updates, phase_updates=updates, micro_batches=updates, samples=updates)
    return RunState(
        clock=clock, scheduler={}, fingerprint="f", phase_fingerprints=("p",), layout={"world_size": 1}
    )


def _save(store: CheckpointStore, updates: int, content: bytes) -> None:
    pending = store.open_pending(updates)
    try:
        (pending / "engine" / "weights.bin").write_bytes(content)
        store.commit(updates, _state(updates), beside=BESIDE)
    except Exception:
        store.discard_pending(updates)
        raise
    store.prune(updates, KEEP_TWO, lambda _: None)


def _prepared(folder: Path, scenario: str) -> tuple[CheckpointStore, set[tuple[int, bytes]]]:
    """Returns the store before the save, and what the newest checkpoint may be after it has been
    interrupted."""
    before, updates, _ = SCENARIOS[scenario]
    store = CheckpointStore(folder / "checkpoints")
    folder.mkdir()
    for number in before:
        pending = store.open_pending(number)
        (pending / "engine" / "weights.bin").write_bytes(b"old")
        store.commit(number, _state(number), beside=BESIDE)
    return store, {(updates, b"new"), *([(before[-1], b"old")] if before else [(0, b"")])}


def _found(store: CheckpointStore) -> tuple[int, bytes]:
    newest = store.newest()
    if newest is None:
        return 0, b""
    return newest.state.clock.updates, (newest.engine_folder / "weights.bin").read_bytes()


def _require_the_next_save(store: CheckpointStore, scenario: str) -> None:
    """The next save succeeds, deletes what it should and leaves nothing else; the one after a run of the same
    name too."""
    updates = SCENARIOS[scenario][1]
    _save(store, updates, b"again")
    assert _found(store) == (updates, b"again")
    _save(store, 6, b"next")
    assert _found(store) == (6, b"next")
    assert sorted(entry.name for entry in store.folder.iterdir()) == [
        "latest",
        f"update_{updates:06d}",
        "update_000006",
    ]
    assert (store.folder / "latest").read_text() == "update_000006\n"


def _operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, *, writes_only: bool = False
) -> Faults:
    store, _ = _prepared(tmp_path / "whole", scenario)
    faults = Faults(tmp_path, writes_only=writes_only)
    with _watching(monkeypatch, faults):
        _save(store, SCENARIOS[scenario][1], b"new")
    assert _found(store) == (SCENARIOS[scenario][1], b"new")
    return faults


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_operation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str) -> None:
    audited: list[str] = []
    active = [True]  # an audit hook cannot be removed

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and str(arguments[0]).startswith(str(tmp_path)):
            audited.append("open")
        elif active and event in _AUDITED:
            audited.append(_AUDITED[event])

    store, _ = _prepared(tmp_path / "audited", scenario)
    sys.addaudithook(hook)
    _save(store, SCENARIOS[scenario][1], b"new")
    active.clear()
    seen = [
        {"replace": "rename", "remove": "unlink"}.get(name, name)
        for name, _ in _operations(tmp_path, monkeypatch, scenario).seen
    ]
    for name in ("mkdir", "rename", "unlink", "rmdir"):
        assert seen.count(name) == audited.count(name), name
    assert seen.count("open") >= audited.count(
        "open"
    )  # an audit event tells paths, which inside rmtree are relative
    assert len(seen) == SCENARIOS[scenario][2]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("fault", ["killed", "failed"])
def test_old_or_new_stands_whatever_operation_does_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, fault: str
) -> None:
    outcomes = set()
    for at in range(SCENARIOS[scenario][2]):
        store, allowed = _prepared(tmp_path / str(at), scenario)
        error = KilledError() if fault == "killed" else OSError(errno.EIO, "Input/output error")
        with (
            suppress(KilledError, CheckpointError, OSError),
            _watching(monkeypatch, Faults(tmp_path, at=at, error=error)),
        ):
            _save(store, SCENARIOS[scenario][1], b"new")
        found = _found(store)
        assert found in allowed, f"operation {at}"
        outcomes.add(found)
        _require_the_next_save(store, scenario)
    assert outcomes == allowed, "some were interrupted before the new one stood and some after"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    writes = _operations(tmp_path, monkeypatch, scenario, writes_only=True).seen
    assert [Path(path).name.partition(".")[0] for _, path in writes] == [
        "weights",
        "state",
        "clips",
        "manifest",
        "latest",
    ]
    for at, (_, path) in enumerate(writes):
        store, allowed = _prepared(tmp_path / str(at), scenario)
        before = sorted(entry.name for entry in store.folder.iterdir()) if store.folder.exists() else []
        full = Faults(
            tmp_path, at=at, error=OSError(errno.ENOSPC, "No space left on device"), writes_only=True
        )
        with (
            _watching(monkeypatch, full),
            pytest.raises((DiskFullError, OSError), match="No space left on device"),
        ):
            _save(store, SCENARIOS[scenario][1], b"new")
        if "latest" in path:  # the new one stands by then
            assert _found(store) == (SCENARIOS[scenario][1], b"new")
        else:
            assert _found(store) in allowed - {(SCENARIOS[scenario][1], b"new")}
            assert sorted(entry.name for entry in store.folder.iterdir()) == before
        assert not list(store.folder.glob("*.pending"))
        assert not list(store.folder.glob("*.tmp"))
        _require_the_next_save(store, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_everything_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    """After a power cut only what was flushed is there: files and folders before the rename, the rename
    before any deletion."""
    seen = _operations(tmp_path, monkeypatch, scenario).seen
    pending = f"update_{SCENARIOS[scenario][1]:06d}.pending"
    store = tmp_path / "whole" / "checkpoints"
    renamed = next(at for at, (name, path) in enumerate(seen) if name == "rename" and path.endswith(pending))
    flushed = {path for name, path in seen[:renamed] if name == "fsync"}
    written = {path for name, path in seen[:renamed] if name == "write"}
    assert (
        {
            str(store / pending / name)
            for name in ("engine/weights.bin", "state.json", *BESIDE, "manifest.json")
        }
        <= written
        <= flushed
    )
    assert {str(store / pending), str(store / pending / "engine"), str(store.parent)} <= flushed
    last_write = max(at for at, (name, _) in enumerate(seen[:renamed]) if name == "write")
    assert {path for name, path in seen[last_write:renamed] if name == "fsync"} >= written
    assert seen[renamed + 1 : renamed + 3] == [("open", str(store)), ("fsync", str(store))]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "failed"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited for", "beside training"])
def test_old_or_new_stands_whatever_operation_of_a_whole_save_does_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, fault: str
) -> None:
    """From the engine's tensors on, with the thread that writes; deletion of the oldest included."""

    def save(folder: Path, updates: int) -> None:
        saver = _saver(folder, asynchronous=asynchronous)
        saver.save(TrainState(engine=engine), _state(updates))
        saver.finish()

    engine = _engine()
    engine.backward(engine(torch.ones(1, 1)).sum())
    engine.step()  # from now on there are moments
    before = tmp_path / "before"
    before.mkdir()
    for old in (1, 2):
        _set(engine, old)
        save(before, old)
    outcomes: set[tuple[int, float]] = set()
    faults = Faults(tmp_path)
    for at in range(-1, 100):
        folder = tmp_path / str(at + 1)
        shutil.copytree(before, folder)
        _set(engine, 3)
        if at < 0:  # counts
            with _watching(monkeypatch, faults):
                save(folder, 3)
            assert len(faults.seen) == WHOLE_SAVE_OPERATIONS
            continue
        if at >= len(faults.seen):
            break
        error = KilledError() if fault == "killed" else OSError(errno.EIO, "Input/output error")
        with (
            suppress(KilledError, CheckpointError, OSError),
            _watching(monkeypatch, Faults(tmp_path, at=at, error=error)),
        ):
            save(folder, 3)
        outcomes.add(_value(folder))
        assert outcomes <= {(2, 2.0), (3, 3.0)}, f"operation {at}"
        _set(engine, 4)
        save(folder, 4)
        assert _value(folder) == (4, 4.0)
        assert not list((folder / "checkpoints").glob("*.pending"))
    assert outcomes == {(2, 2.0), (3, 3.0)}


def _engine() -> LocalEngine:
    groups = [ParameterGroup(names=("weight", "bias"), is_decayed=True)]
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 0}}, where="test")
    return LocalEngine(
        nn.Linear(1, 1),
        groups,
        optimizer=OptimizerConfig(),
        settings=settings,
        micro_batch_size=1,
        accumulation=1,
    )


def _saver(folder: Path, *, asynchronous: bool) -> Saver:
    config = CheckpointConfig(keep_last=2, asynchronous=asynchronous)
    store = CheckpointStore(folder / "checkpoints")
    return Saver(store=store, config=config, phase_names=("only",), beside=BESIDE)


def _set(engine: LocalEngine, value: float) -> None:
    engine.write_values([("weight", torch.full((1, 1), value)), ("bias", torch.full((1,), value))])


def _value(folder: Path) -> tuple[int, float]:
    """Returns update and value of the newest checkpoint."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    assert newest is not None
    with ShardReader(newest.engine_folder) as reader:
        weight, bias = reader.whole("master", "weight").item(), reader.whole("master", "bias").item()
    assert weight == bias
    return newest.state.clock.updates, weight


# A save of adapters on a base that the run has made: the base first, then the checkpoint; then two
# checkpoints and their base go.
OLD_BASE, NEW_BASE = "a" * 64, "b" * 64
BASE_OPERATIONS = 81


def _save_on_base(store: CheckpointStore, updates: int, sha256: str) -> None:
    if not has_base(store.folder, sha256):
        pending = open_base(store.folder, sha256, num_bytes=1)
        try:
            (pending / "engine" / "weights.bin").write_bytes(sha256.encode())
            commit_base(store.folder, sha256)
        except Exception:
            discard_pending_base(store.folder, sha256)
            raise
    pending = store.open_pending(updates)
    try:
        base = asdict(Base(sha256=sha256, is_stored=True, origin="the run"))
        (pending / "engine" / "engine.json").write_text(json.dumps({"base": base}))
        store.commit(updates, _state(updates))
    except Exception:
        store.discard_pending(updates)
        raise
    store.prune(updates, CheckpointConfig(keep_last=1), lambda _: None)


def _prepared_on_base(folder: Path) -> CheckpointStore:
    folder.mkdir()
    store = CheckpointStore(folder / "checkpoints")
    _save_on_base(store, 2, OLD_BASE)
    return store


def test_every_operation_of_a_save_with_its_base_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, faults = _prepared_on_base(tmp_path / "whole"), Faults(tmp_path)
    with _watching(monkeypatch, faults):
        _save_on_base(store, 4, NEW_BASE)
    assert len(faults.seen) == BASE_OPERATIONS
    stored = str(store.folder / "bases" / NEW_BASE)
    renamed = next(
        at for at, (name, path) in enumerate(faults.seen) if name == "rename" and path == f"{stored}.pending"
    )
    written = {path for name, path in faults.seen[:renamed] if name == "write"}
    assert {f"{stored}.pending/engine/weights.bin", f"{stored}.pending/manifest.json"} == written
    assert written <= {path for name, path in faults.seen[:renamed] if name == "fsync"}
    assert faults.seen[renamed + 1 : renamed + 3] == [
        ("open", str(store.folder / "bases")),
        ("fsync", str(store.folder / "bases")),
    ]
    assert not any(f"update_{4:06d}" in path for _, path in faults.seen[:renamed]), (
        "the base stands before who refers to it"
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "failed"])
def test_a_checkpoint_always_finds_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    outcomes = set()
    for at in range(BASE_OPERATIONS):
        store = _prepared_on_base(tmp_path / str(at))
        error = KilledError() if fault == "killed" else OSError(errno.ENOSPC, "No space left on device")
        with (
            suppress(KilledError, CheckpointError, OSError),
            _watching(monkeypatch, Faults(tmp_path, at=at, error=error)),
        ):
            _save_on_base(store, 4, NEW_BASE)
        newest = store.newest()  # verifies the base too
        assert newest is not None, f"operation {at}"
        outcomes.add(newest.state.clock.updates)
        _save_on_base(store, 4, NEW_BASE)
        _save_on_base(store, 5, NEW_BASE)
        assert sorted(path.name for path in store.folder.iterdir()) == ["bases", "latest", "update_000005"]
        assert [path.name for path in (store.folder / "bases").iterdir()] == [NEW_BASE]
        assert store.read(store.folder / "update_000005").state.clock.updates == 5
    assert outcomes == {2, 4}


def test_bases_stay_while_a_checkpoint_cannot_say_what_it_needs(tmp_path: Path) -> None:
    store = _prepared_on_base(tmp_path / "run")
    (store.folder / "update_000002" / "engine" / "engine.json").write_text("{")
    _save_on_base(store, 4, NEW_BASE)
    assert sorted(path.name for path in (store.folder / "bases").iterdir()) == [OLD_BASE, NEW_BASE]


@pytest.mark.parametrize("sha256", ["../../x", "A" * 64, "a" * 63, 3])
def test_a_reference_that_leads_elsewhere_is_refused(tmp_path: Path, sha256: Any) -> None:
    store = _prepared_on_base(tmp_path / "run")
    folder = store.folder / "update_000002"
    base = {"sha256": sha256, "is_stored": True, "origin": "x"}
    (folder / "engine" / "engine.json").write_text(json.dumps({"base": base}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"engine\.json: base: must be null or have"):
        store.read(folder)
