"""Shards behind a real S3 server and a web server, over lines that are slow, cut answers, fail or are gone.

The servers are processes of their own on this machine's loopback; nothing of boto3 or urllib3 is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.errors import DataError, StorageError
from aiprod_ds.shards import s3
from aiprod_ds.shards.cache import ShardCache
from aiprod_ds.shards.index import read_index
from aiprod_ds.shards.opening import open_shards
from aiprod_ds.shards.reader import ShardReader
from aiprod_ds.shards.storage import INDEX, FolderStorage, open_storage
from aiprod_ds.shards.writer import PackedFile, index_shards, write_shards
from aiprod_ds.testing.object_storage import BadLine, Server, bad_line, s3_server, web_server

pytestmark = pytest.mark.slow

ADDRESS = "s3://tests/some/prefix"
CONTENTS = {f"clip {number}/ä.bin": os.urandom(40_000 + 1000 * number) for number in range(12)}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server("tests") as running:
        groups = [[PackedFile(name=name, content=content)] for name, content in CONTENTS.items()]
        storage = open_storage(ADDRESS, endpoint_url=running.url)
        write_shards(groups, storage, kind="things", shard_bytes=200_000)
        yield running


def _open(server: Server, cache: Path | None = None, *, cache_gb: float = 0.0) -> ShardReader:
    settings = StorageConfig(
        endpoint_url=server.url,
        cache_dir=None if cache is None else str(cache),
        cache_gb=cache_gb,
        patience_seconds=1.0,
    )
    shards = open_shards(ADDRESS, settings)
    assert shards is not None
    return shards


def _all(shards: ShardReader) -> dict[str, bytes]:
    return {name: shards.read(name) for name in shards.members}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_everything_comes_back(server: Server) -> None:
    shards = _open(server)
    assert _all(shards) == CONTENTS
    assert _all(pickle.loads(pickle.dumps(shards))) == CONTENTS
    assert str(shards) == ADDRESS


def test_the_endpoint_may_stand_in_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    shards = open_shards(ADDRESS, StorageConfig(cache_gb=0.0))
    assert shards is not None
    assert shards.read("clip 3/ä.bin") == CONTENTS["clip 3/ä.bin"]


def test_files_that_lie_together_are_one_request(server: Server, tmp_path: Path) -> None:
    shards = _open(server)
    asked: list[tuple[str, int, int | None]] = []
    read = shards._storage.read

    def counted(name: str, start: int = 0, size: int | None = None) -> bytes:
        asked.append((name, start, size))
        return read(name, start, size)

    shards._storage.read = counted  # type: ignore[method-assign]
    names = [name for name, member in shards.members.items() if member.shard == 0]
    shards.fetch(names)
    assert {name: shards.read(name) for name in names} == {name: CONTENTS[name] for name in names}
    last = shards.members[names[-1]]
    assert asked == [("shard-000000.tar", 512 * 3, last.offset + last.size - 512 * 3)]


@pytest.mark.parametrize(
    "line",
    [
        BadLine(cut_every=2),
        BadLine(fail_every=2),
        BadLine(latency_seconds=0.02, bytes_per_second=2e6, cut_every=3, fail_every=5),
    ],
    ids=["cut", "failing", "slow, cut and failing"],
)
def test_a_bad_line_changes_nothing(server: Server, line: BadLine, tmp_path: Path) -> None:
    with bad_line(server, line) as behind:
        shards = _open(behind, tmp_path, cache_gb=1.0)
        assert _all(shards) == CONTENTS
    assert not list(tmp_path.rglob("*.part"))
    assert _bytes_in(tmp_path) == sum(len(content) for content in CONTENTS.values())


def test_what_the_cache_holds_needs_no_server(server: Server, tmp_path: Path) -> None:
    with bad_line(server, BadLine()) as behind:
        shards = _open(behind, tmp_path, cache_gb=1.0)
        _all(shards)
        behind.kill()
        assert _all(shards) == CONTENTS


def test_a_cache_smaller_than_the_data_works_and_keeps_its_limit(server: Server, tmp_path: Path) -> None:
    shards = _open(server, tmp_path, cache_gb=150_000 / 1e9)
    for _ in range(2):
        assert _all(shards) == CONTENTS
        assert 0 < _bytes_in(tmp_path) <= 150_000


def test_what_a_disk_has_changed_in_the_cache_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    _all(_open(server, tmp_path, cache_gb=1.0))
    for path in tmp_path.glob("*/*"):
        path.write_bytes(b"!" + path.read_bytes()[1:])
    assert _all(_open(server, tmp_path, cache_gb=1.0)) == CONTENTS
    with bad_line(server, BadLine()) as behind:
        again = _open(behind, tmp_path, cache_gb=1.0)
        behind.kill()
        assert _all(again) == CONTENTS, "what was fetched anew was kept"


def _read_in_fork(shards: ShardReader, results: multiprocessing.Queue[bool]) -> None:
    results.put(_all(shards) == CONTENTS)


def test_forks_of_a_process_that_has_read_share_the_cache(server: Server, tmp_path: Path) -> None:
    shards = _open(server, tmp_path, cache_gb=200_000 / 1e9)
    shards.read("clip 0/ä.bin")  # so that there are connections that a fork must not use
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    forks = [context.Process(target=_read_in_fork, args=(shards, results)) for _ in range(4)]
    for fork in forks:
        fork.start()
    assert [results.get(timeout=60) for _ in forks] == [True] * 4
    for fork in forks:
        fork.join()
    assert _all(shards) == CONTENTS
    assert _bytes_in(tmp_path) <= 200_000


def test_a_server_that_is_gone_is_a_clear_error(server: Server) -> None:
    with bad_line(server, BadLine()) as behind:
        shards = _open(behind)
        behind.kill()
        told = r"s3://tests/some/prefix/shard-000000.tar: must be delivered.*EndpointConnectionError.*goes on"
        with pytest.raises(StorageError, match=told):
            shards.read("clip 0/ä.bin")


def test_a_missing_bucket_prefix_or_index_is_a_clear_error(server: Server) -> None:
    settings = StorageConfig(endpoint_url=server.url)
    told = rf"must have {INDEX} beside them, got none.*aiprod-ds shard --index s3://tests/nothing"
    with pytest.raises(DataError, match=told):
        open_shards("s3://tests/nothing", settings)
    with pytest.raises(
        DataError, match=r"s3://other/x: must be a bucket that can be used, got: .*NoSuchBucket"
    ):
        open_shards("s3://other/x", settings)


def test_no_credentials_are_told_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        DataError, match="must be a bucket that can be used, got: Unable to locate credentials"
    ):
        _open(server)


def test_the_index_is_made_anew(server: Server) -> None:
    storage = open_storage("s3://tests/again", endpoint_url=server.url)
    groups = [[PackedFile(name=name, content=content)] for name, content in CONTENTS.items()]
    made = write_shards(groups, storage, kind="things", shard_bytes=200_000)
    again = index_shards(storage, kind_of=lambda _: "things", facts_of=lambda *_: None)
    assert again == made == read_index(storage)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    groups = [[PackedFile(name=name, content=content)] for name, content in CONTENTS.items()]
    write_shards(groups, FolderStorage(folder / "a b"), kind="things", shard_bytes=200_000)
    return folder


def test_a_web_server_that_answers_ranges_does_too(folder: Path, tmp_path: Path) -> None:
    line = BadLine(cut_every=3, fail_every=4)
    with web_server(folder, line) as running:
        shards = open_shards(f"{running.url}/a%20b/", StorageConfig(cache_dir=str(tmp_path)))
        assert shards is not None
        assert _all(shards) == CONTENTS
        assert str(shards) == f"{running.url}/a%20b"


def test_a_web_server_cannot_be_written_and_says_what_is_missing(folder: Path) -> None:
    with web_server(folder) as running:
        with pytest.raises(DataError, match=f"must have {INDEX} beside them"):
            open_shards(f"{running.url}/other", StorageConfig())
        with pytest.raises(DataError, match="cannot be written"):
            write_shards([], open_storage(running.url), kind="things", shard_bytes=1)
        with pytest.raises(DataError, match="cannot be listed"):
            index_shards(open_storage(running.url), kind_of=lambda _: "", facts_of=lambda *_: None)


def test_a_shard_that_was_exchanged_on_a_web_server_shows(folder: Path, tmp_path: Path) -> None:
    with web_server(folder) as running:
        shards = open_shards(f"{running.url}/a%20b", StorageConfig(cache_dir=str(tmp_path)))
        assert shards is not None
        path = folder / "a b" / "shard-000002.tar"
        before = path.read_bytes()
        path.write_bytes(before[::-1])
        name = next(name for name, member in shards.members.items() if member.shard == 2)
        with pytest.raises(DataError, match=r"with the hash \w{12} of the index, got others"):
            shards.read(name)
        assert not list(tmp_path.glob("*/*"))
        path.write_bytes(before)
        assert shards.read(name) == CONTENTS[name]


def test_without_the_extra_the_error_names_it() -> None:
    # What an import without boto3 raises; the module itself cannot be imported twice in one process.
    source = Path(s3.__file__).read_text(encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "boto3", None)
        with pytest.raises(DataError, match=r"needs boto3.*pip install 'aiprod_ds\[storage\]'"):
            exec(compile(source, s3.__file__, "exec"), {"__name__": "aiprod_ds.shards.again"})


def test_a_full_cache_folder_does_not_stop_reading(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    shards = _open(server, tmp_path / "cache" / "inside", cache_gb=1.0)
    assert _all(shards) == CONTENTS
    assert isinstance(shards._cache, ShardCache)
