"""A run folder has one run: what another process of it, alive or dead, means for a start."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.errors import CheckpointError
from aiprod_ds.train.resume.folder_lock import LOCK, FolderLock


@pytest.fixture
def another(tmp_path: Path) -> Any:
    """Starts processes that do something with the folder's lock, tell so, and live on; kills what is left of
    them."""
    started: list[int] = []

    def start(hold: Callable[[FolderLock], None]) -> int:
        told, tell = os.pipe()
        process = os.fork()
        if process == 0:
            hold(FolderLock(tmp_path))
            os.write(tell, b".")
            signal.pause()
        started.append(process)
        assert os.read(told, 1) == b"."
        os.close(told)
        os.close(tell)
        return process

    yield start
    for process in started:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_run_that_is_alive_is_named(another: Any, tmp_path: Path) -> None:
    process = another(lambda lock: lock.take())
    with (
        FolderLock(tmp_path) as lock,
        pytest.raises(CheckpointError, match=rf"one run at a time.* process {process} on "),
    ):
        lock.take(within_seconds=0.0)
    with FolderLock(tmp_path) as lock, pytest.raises(CheckpointError, match="one run at a time"):
        lock.take_if_used(within_seconds=0.0)


def test_any_rank_that_is_alive_counts_and_a_killed_one_does_not(another: Any, tmp_path: Path) -> None:
    first = another(lambda lock: lock.take())
    second = another(lambda lock: lock.share())
    os.kill(first, signal.SIGKILL)
    with FolderLock(tmp_path) as lock:
        with pytest.raises(CheckpointError, match=f"process {first} on"):
            lock.take(within_seconds=0.3)
        os.kill(second, signal.SIGKILL)
        lock.take(within_seconds=10.0)


def test_what_rank_0_has_forked_does_not_hold_it(tmp_path: Path) -> None:
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        lock = FolderLock(tmp_path)
        lock.take()
        worker = os.fork()
        if worker == 0:
            signal.pause()
        os.write(tell, f"{worker}".encode())
        signal.pause()
    worker = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with FolderLock(tmp_path) as lock:
        lock.take(within_seconds=0.0)
    os.kill(worker, signal.SIGKILL)


def test_the_end_of_a_run_lets_the_next_one_begin(another: Any, tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        lock.take()
        lock.take()  # as after a folder was moved aside
    another(lambda lock: lock.take(within_seconds=0.0))


def test_a_folder_in_which_no_run_was_stays_as_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with FolderLock(folder) as lock:
            lock.take_if_used()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with FolderLock(tmp_path) as lock:
        lock.take(within_seconds=0.0)
        lock.share()
    assert "folder_not_locked" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
