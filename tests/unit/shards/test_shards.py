"""Shards in a folder: what is written, read by name, found damaged or out of date, and indexed anew."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.errors import DataError, StorageError
from aiprod_ds.shards.opening import open_shards
from aiprod_ds.shards.reader import ShardReader
from aiprod_ds.shards.storage import (
    INDEX,
    FolderStorage,
    InterruptedTransferError,
    open_storage,
    transferred,
)
from aiprod_ds.shards.writer import PackedFile, index_shards, write_shards

LONG = f"deep/{'long ' * 30}näme.bin"  # longer than the plain header of a tar has room for


def _files() -> list[list[PackedFile]]:
    groups = []
    for number in range(6):
        content = bytes([number]) * (1000 * number)
        facts = {"number": number} if number % 2 else None
        groups.append([PackedFile(name=f"a/{number}.bin", content=content, facts=facts)])
    groups[3].append(PackedFile(name=LONG, content=b"beside"))
    return groups


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(_files(), FolderStorage(tmp_path / "shards"), kind="things", shard_bytes=5000)
    return tmp_path / "shards"


def _open(folder: Path | str) -> ShardReader:
    shards = open_shards(str(folder), StorageConfig())
    assert shards is not None
    return shards


def test_every_file_comes_back(folder: Path) -> None:
    shards = _open(folder)
    packed = {file.name: file for group in _files() for file in group}
    assert list(shards.members) == list(packed)
    assert {name: shards.read(name) for name in shards.members} == {
        name: file.content for name, file in packed.items()
    }
    assert {name: member.known for name, member in shards.members.items()} == {
        name: file.facts for name, file in packed.items()
    }
    assert shards.kind == "things"
    assert _open(f"file://{folder}").members == shards.members


def test_groups_are_whole_and_shards_are_small(folder: Path) -> None:
    shards = _open(folder)
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
        "shard-000003.tar",
    ]
    assert shards.members["a/3.bin"].shard == shards.members[LONG].shard


def test_any_tar_unpacks_them(folder: Path, tmp_path: Path) -> None:
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            archive.extractall(tmp_path / "python", filter="data")
        (tmp_path / "tar").mkdir(exist_ok=True)
        command = ["tar", "xf", str(shard), "-C", str(tmp_path / "tar")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
    packed = {file.name: file.content for group in _files() for file in group}
    for unpacked in (tmp_path / "python", tmp_path / "tar"):
        assert {name: (unpacked / name).read_bytes() for name in packed} == packed


def test_the_same_files_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_shards(_files(), FolderStorage(again), kind="things", shard_bytes=5000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


def test_a_path_for_libraries_ends_as_the_name_does_and_errors_name_the_file(folder: Path) -> None:
    shards = _open(folder)
    with shards.file("a/2.bin") as path:
        assert (path.suffix, path.read_bytes()) == (".bin", bytes([2]) * 2000)
    assert not path.exists()
    with pytest.raises(DataError, match=r"shards/a/2\.bin: must be media"), shards.file("a/2.bin") as path:
        raise DataError(f"{path}: must be media")


def test_a_reader_travels_to_other_processes(folder: Path) -> None:
    shards = pickle.loads(pickle.dumps(_open(folder)))
    assert shards.read("a/1.bin") == bytes([1]) * 1000


def test_other_bytes_than_were_packed_are_refused(folder: Path) -> None:
    shards = _open(folder)
    member = shards.members["a/4.bin"]
    with (folder / f"shard-{member.shard:06d}.tar").open("r+b") as file:
        file.seek(member.offset + 10)
        file.write(b"!")
    with pytest.raises(
        DataError, match=r"shards/a/4\.bin: must be 4000 bytes at 512 of shard-000002.*others"
    ):
        shards.read("a/4.bin")
    assert shards.read("a/5.bin") == bytes([5]) * 5000


def test_a_missing_index_is_an_error_with_its_command(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(DataError, match=rf"must have {INDEX} beside.*`aiprod-ds shard --index {folder}`"):
        _open(folder)


def _shorter(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def _one_less(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()


def _one_more(folder: Path) -> None:
    (folder / "shard-000009.tar").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_shorter, r"shard-000001.tar of \d+ bytes in place of \d+"),
        (_one_less, "no shard-000002.tar"),
        (_one_more, "shard-000009.tar, which it does not know"),
    ],
)
def test_an_index_of_other_shards_is_refused(folder: Path, damage: object, told: str) -> None:
    assert callable(damage)
    damage(folder)
    with pytest.raises(DataError, match=rf"must be that of the shards, got {told}.*shard --index"):
        _open(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no gzip", "incorrect header"),
        (gzip.compress(b'{"format": "another"}\n'), "no header of the format"),
        (gzip.compress(b"[]\n"), "no header of the format"),
    ],
    ids=["text", "another", "no header"],
)
def test_a_damaged_index_is_refused(folder: Path, content: bytes, told: str) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(DataError, match=rf"must be a whole index.*{told}"):
        _open(folder)


def test_a_torn_index_is_refused(folder: Path) -> None:
    whole = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="an end in the middle"):
        _open(folder)


@pytest.mark.parametrize("place", [(9, 0, 5), (0, 10**9, 5), (0, -1, 5), (0, 0, -5)])
def test_a_row_that_lies_in_no_shard_is_refused(folder: Path, place: tuple[int, int, int]) -> None:
    lines = gzip.decompress((folder / INDEX).read_bytes()).decode().splitlines()
    name, _, _, _, sha256, facts = json.loads(lines[1])
    lines[1] = json.dumps([name, *place, sha256, facts])
    (folder / INDEX).write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(DataError, match="a row that lies in no shard"):
        _open(folder)


def test_an_index_made_anew_is_the_same(folder: Path) -> None:
    before = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    numbers = {f"a/{number}.bin": {"number": number} for number in (1, 3, 5)}

    def facts_of(name: str, file: Path) -> object:
        assert file.suffix == ".bin"
        return numbers.get(name)

    def kind_of(names: Sequence[str]) -> str:
        assert len(names) == 7
        return "things"

    index_shards(FolderStorage(folder), kind_of=kind_of, facts_of=facts_of)
    assert (folder / INDEX).read_bytes() == before


def test_nothing_is_written_over(folder: Path) -> None:
    with pytest.raises(DataError, match="must be empty, got 5 files"):
        write_shards(_files(), FolderStorage(folder), kind="things", shard_bytes=5000)


def test_names_are_unique(tmp_path: Path) -> None:
    twice = [[PackedFile(name="a", content=b"1")], [PackedFile(name="a", content=b"2")]]
    with pytest.raises(DataError, match="a name of its own"):
        write_shards(twice, FolderStorage(tmp_path / "x"), kind="things", shard_bytes=5000)
    assert not (tmp_path / "x" / INDEX).exists()


def test_a_folder_without_shards_is_none(tmp_path: Path) -> None:
    assert open_shards(str(tmp_path), StorageConfig()) is None
    assert open_shards(str(tmp_path / "missing"), StorageConfig()) is None


@pytest.mark.parametrize(
    "address",
    ["s3://key:hunter2@bucket/x", "https://host/x?signature=hunter2", "https:///x", "s3://bucket/x#a"],
)
def test_an_address_with_secrets_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(DataError, match="must have a host or bucket and no user") as found:
        open_storage(address)
    assert "hunter2" not in str(found.value)


def test_a_transfer_is_taken_up_where_it_broke_off() -> None:
    waits: list[float] = []
    asked: list[int] = []

    def fetch(done: int):
        asked.append(done)
        yield b"0123456789"[done : done + 3]
        if done + 3 < 10:
            raise InterruptedTransferError("cut")

    found = transferred(
        fetch, size=10, where="x", is_reachable=pytest.fail, patience_seconds=1, wait=waits.append
    )
    assert found == b"0123456789"
    assert asked == [0, 3, 6, 9]
    assert waits == [0.1, 0.1, 0.1]


def _refused(done: int) -> Iterator[bytes]:
    raise InterruptedTransferError("refused")
    yield b""


def test_a_file_that_cannot_be_read_where_others_can_is_given_up_soon() -> None:
    waits: list[float] = []
    with pytest.raises(DataError, match="x: must be readable as other files there are, got: refused") as told:
        transferred(
            _refused, size=9, where="x", is_reachable=lambda: True, patience_seconds=99, wait=waits.append
        )
    assert not isinstance(told.value, StorageError)
    assert waits == [0.2, 0.4, 0.8, 1.6]


def test_a_storage_that_is_out_of_reach_is_waited_for() -> None:
    waits: list[float] = []
    with pytest.raises(StorageError, match="got: refused, and nothing else within 120 s"):
        transferred(
            _refused,
            size=9,
            where="x",
            is_reachable=lambda: False,
            patience_seconds=120,
            wait=waits.append,
            now=lambda: sum(waits),
        )
    assert waits[:8] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6]
    assert max(waits) == 30
    assert sum(waits) == pytest.approx(120)


def test_reading_hashes_each_local_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, hashed = _open(folder), []
    sha256 = hashlib.sha256

    def counted(data: bytes = b""):
        hashed.append(len(data))
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", counted)
    for _ in range(3):
        shards.read("a/3.bin")
    assert hashed == [3000]


def test_descriptors_are_closed(folder: Path) -> None:
    shards = _open(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with shards.file("a/2.bin"):
            pass
        shards.read("a/1.bin")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
