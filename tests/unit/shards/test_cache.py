"""The cache of remote shards: its limit, what goes first, several processes at once, and disks that fail."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from aiprod_ds.shards.cache import ShardCache, default_cache_folder


def _data(number: int, size: int = 1000) -> bytes:
    return number.to_bytes(8, "little") * (size // 8)


def _keep(cache: ShardCache, *numbers: int, size: int = 1000) -> list[str]:
    names = []
    for number in numbers:
        data = _data(number, size)
        names.append(hashlib.sha256(data).hexdigest())
        cache.keep(names[-1], data)
    return names


def _read(cache: ShardCache, name: str) -> bytes | None:
    descriptor = cache.open(name)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=4000)
    names = _keep(cache, 0, 1, 2, 3)
    for age, name in enumerate(names):
        path = tmp_path / name[:2] / name[2:]
        os.utime(path, (1000 + age, 1000 + age))
    assert _read(cache, names[0]) == _data(0)  # and so it is not the oldest any more
    _keep(cache, 4)
    assert [_read(cache, name) is not None for name in names] == [True, False, False, True]
    assert _bytes_in(tmp_path) <= 4000


def test_a_file_larger_than_the_cache_is_not_kept_and_empties_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=4000)
    names = _keep(cache, 0, 1)
    (large,) = _keep(cache, 2, size=4008)
    assert [_read(cache, name) is None for name in (*names, large)] == [False, False, True]


def test_what_is_open_stays_readable_when_room_is_made(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=1000)
    (name,) = _keep(cache, 0)
    descriptor = cache.open(name)
    assert descriptor is not None
    _keep(cache, 1)
    assert _read(cache, name) is None
    with os.fdopen(descriptor, "rb") as file:
        assert file.read() == _data(0)


def test_another_cache_of_the_folder_counts_what_is_there(tmp_path: Path) -> None:
    _keep(ShardCache(tmp_path, limit_bytes=10_000), *range(10))
    _keep(ShardCache(tmp_path, limit_bytes=3000), 10)
    assert _bytes_in(tmp_path) <= 3000


def test_a_dead_writer_leaves_nothing_for_ever(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, limit_bytes=3000)
    (name,) = _keep(cache, 0)
    part = tmp_path / name[:2] / f"{'0' * 62}.part"
    part.write_bytes(b"x" * 900)
    (tmp_path / ".lock").write_text("2900".ljust(32))  # what was counted and never written
    _keep(cache, 1, 2)
    assert not part.exists()
    assert (tmp_path / ".lock").read_text().strip() == str(_bytes_in(tmp_path))


def _hammer(folder: Path, seed: int, wrong: multiprocessing.Queue[int]) -> None:
    cache = ShardCache(folder, limit_bytes=20_000)
    found = 0
    for step in range(300):
        number = (step * 7 + seed * 13) % 50
        (name,) = _keep(cache, number)
        read = _read(cache, name)
        found += read is not None and read != _data(number)
        found += _bytes_now(folder) > 20_000
    wrong.put(found)


def _bytes_now(folder: Path) -> int:
    """Returns the bytes of all files while nobody adds one: counted among changes, one would count twice."""
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_many_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, wrong)) for seed in range(4)]
    for process in processes:
        process.start()
    assert [wrong.get(timeout=60) for _ in processes] == [0, 0, 0, 0]
    for process in processes:
        process.join()
    assert 0 < _bytes_in(tmp_path) <= 20_000


def test_a_disk_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = ShardCache(tmp_path / "file" / "cache", limit_bytes=4000)
    with caplog.at_level(logging.WARNING):
        names = _keep(cache, 0, 1)
    assert [_read(cache, name) for name in names] == [None, None]
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "cache of shards cannot be written"
    ]


def test_it_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPROD_DS_CACHE_DIR", "/own")
    assert default_cache_folder() == Path("/own/shards")
    monkeypatch.delenv("AIPROD_DS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_folder() == Path("/xdg/aiprod_ds/shards")
