"""A file that grows by records: whole after every fault, in order, and within its bound.

Oracle: the records joined, as a disk that never fails holds them.
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from aiprod_ds.appended_file import AppendedFile

FULL = OSError(errno.ENOSPC, "No space left on device")


class Room:
    """Stands for `os.write` on a disk with so many bytes left; what fits is written."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._write = os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if not self.left:
            raise FULL
        written = self._write(descriptor, data[: self.left])
        self.left -= written
        return written


def test_half_a_record_is_cut_off_and_comes_whole_once_there_is_room(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "rows")
    file.append(b"first\n")
    file.add(b"second\n")
    with patch.object(os, "write", Room(9)), pytest.raises(OSError, match="No space"):
        file.append(b"third\n")
    assert (tmp_path / "rows").read_bytes() == b"first\nsecond\n"
    assert file.num_waiting == 1
    file.append(b"fourth\n")
    assert (tmp_path / "rows").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert (file.num_waiting, file.num_lost) == (0, 0)


@pytest.mark.parametrize("left_out", [b"", b"whole\n", b"whole\n" * 20_000])
def test_what_a_kill_cut_short_is_repaired_by_the_next_process(tmp_path: Path, left_out: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(left_out + b"ha")
    AppendedFile(path).append(b"next\n")
    assert path.read_bytes() == left_out + b"next\n"


def test_half_a_record_that_cannot_be_cut_off_at_once_is_cut_off_later(tmp_path: Path) -> None:
    """Also of records without an end of their own, where the size alone tells."""
    for end in (b"\n", b""):
        path = tmp_path / f"rows{len(end)}"
        file = AppendedFile(path, ends_with=end)
        file.append(b"first" + end)
        refuse = patch.object(os, "ftruncate", side_effect=OSError(errno.EIO, "Input/output error"))
        with refuse, patch.object(os, "write", Room(3)), pytest.raises(OSError, match="No space"):
            file.append(b"second" + end)
        assert path.read_bytes() == b"first" + end + b"sec"
        file.append(b"third" + end)
        assert path.read_bytes() == b"first" + end + b"second" + end + b"third" + end


def test_a_folder_that_is_gone_is_not_made_and_another_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    file = AppendedFile(folder / "rows")
    file.append(b"1\n")
    folder.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        file.append(b"2\n")
    assert not folder.exists()
    (tmp_path / "away").rename(folder)
    (folder / "rows").write_bytes(b"1, written anew\n")
    file.append(b"3\n")
    assert (folder / "rows").read_bytes() == b"1, written anew\n2\n3\n"


def test_the_oldest_go_beyond_the_bound(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "none" / "rows", limit_bytes=6)
    for number in range(5):
        with pytest.raises(FileNotFoundError):
            file.append(f"{number}\n".encode())
    assert (file.num_waiting, file.num_lost) == (3, 2)
    (tmp_path / "none").mkdir()
    file.flush()
    assert (tmp_path / "none" / "rows").read_bytes() == b"2\n3\n4\n"


@pytest.mark.parametrize("end", [b"\n", b""])
def test_any_order_of_faults_loses_and_tears_nothing(tmp_path: Path, end: bytes) -> None:
    """200 disks, on each of which a third of the calls of the system fail, some after a part."""
    for seed in range(200):
        draw = random.Random(seed)
        real = {name: getattr(os, name) for name in ("open", "write", "ftruncate", "fstat")}

        def unreliable(name: str, draw: random.Random = draw, real: dict[str, object] = real) -> object:
            def call(*arguments: object) -> object:
                if draw.random() < 1 / 3:
                    if name == "write" and draw.random() < 0.5:
                        descriptor, data = arguments
                        return real[name](descriptor, data[: draw.randint(1, len(data))])  # type: ignore[operator, index, arg-type]
                    raise OSError(draw.choice((errno.ENOSPC, errno.EIO, errno.ESTALE)), "no")
                return real[name](*arguments)  # type: ignore[operator]

            return call

        path = tmp_path / str(seed)
        file = AppendedFile(path, ends_with=end)
        records = [f"record {number} {'x' * draw.randint(0, 50)}".encode() + end for number in range(20)]
        with patch.multiple(os, **{name: unreliable(name) for name in real}):
            for record in records:
                try:
                    file.append(record)
                except OSError:
                    continue
        file.flush()
        assert path.read_bytes() == b"".join(records), seed
