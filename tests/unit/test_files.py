"""Replacing and hashing files."""

import hashlib
from pathlib import Path

import pytest

from aiprod_ds import files


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write_atomically(path, "old")
    files.write_atomically(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    files.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_that_of_the_whole_file_around_the_block_size(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    (tmp_path / "file").write_bytes(content)
    assert files.file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
