"""Replacing and hashing files."""

import hashlib
import os
import socket
from pathlib import Path

import pytest

from aiprod_ds import files
from aiprod_ds.files import folder_problem, read_text, read_whole, remove_temporary


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


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\r\nb\xc3\xa9")
    assert read_whole(path) == b"a\r\nb\xc3\xa9"
    assert read_text(path) == "a\nbé"
    assert read_whole(path, limit=6) == b"a\r\nb\xc3\xa9"
    with pytest.raises(OSError, match="it has more than 5 bytes"):
        read_whole(path, limit=5)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "folder", "NUL", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    server = socket.socket(socket.AF_UNIX)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "NUL":
        path = Path("a\0b")
    else:
        server.bind(str(path))
    with server, pytest.raises(OSError, match=r"no regular file|Is a directory|null byte|No such device"):
        read_whole(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "it is no folder"),
        ("file/below", "Not a directory"),
        ("/dev/null", "it is no folder"),
        ("/dev/null/below", "Not a directory"),
        ("/proc/nothing/below", "No such file or directory"),
        ("new/" + "n" * 256, "File name too long"),
        ("n" * 256, "File name too long"),
        ("a/" * 3000, "File name too long"),
        ("a\0b", "null byte"),
        ("a\ud800b", "it is no text"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    found = folder_problem(tmp_path / name)
    assert found is not None
    assert reason in found
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [".", "new", "new/er/est", "é" * 127])
def test_a_folder_that_can_be_made_is_good_and_is_not_made(tmp_path: Path, name: str) -> None:
    assert folder_problem(tmp_path / name) is None
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_others_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    left = [tmp_path / "report.json.123.tmp", tmp_path / "below" / "plan.json.7.tmp"]
    kept = [tmp_path / "report.json", tmp_path / "own.tmp", tmp_path / "below" / "clip.mp4"]
    for path in (*left, *kept):
        path.touch()
    remove_temporary(tmp_path)
    assert [path for path in left if path.exists()] == []
    assert all(path.exists() for path in kept)
