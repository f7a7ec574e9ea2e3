"""What a disk's fault means to a run: told once, counted, judged by the rule; and in words to a command."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from aiprod_ds import bad_disk
from aiprod_ds.bad_disk import DiskWatch, disk_error, disk_required, fault_in_words, is_disk_fault
from aiprod_ds.errors import ConfigError, DiskError

Usage = namedtuple("Usage", "total used free")
FULL = OSError(errno.ENOSPC, "No space left on device")


def refuse() -> None:
    raise FULL


def test_an_outage_is_told_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = DiskWatch(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            assert watch.attempt("metrics.jsonl", refuse) is None
        assert watch.is_out("metrics.jsonl")
        assert watch.attempt("metrics.jsonl", lambda: 7) == 7
        assert watch.attempt("samples", lambda: 8) == 8
    told = [record.message.partition(" ")[0] for record in caplog.records]
    assert told == ["not_written", "written_again"]
    assert "bytes free" in caplog.records[0].message
    (note,) = watch.notes()
    assert note.startswith("metrics.jsonl: 100 writes failed, first: No space left on device (")
    assert note.endswith("later ones did not")
    watch.require_no_fault()
    watch.require_written("metrics.jsonl")


def test_a_disk_that_comes_and_goes_is_told_less_and_less(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Closed form: outages 1, 2, 4, ..., 512 of 1,000 are told, each with its end."""
    watch = DiskWatch(tmp_path)
    for _ in range(1000):
        watch.attempt("metrics.jsonl", refuse)
        watch.attempt("metrics.jsonl", lambda: None)
    assert len(caplog.records) == 2 * 10


def test_stop_wants_the_run_to_end_and_says_how_to_go_on(tmp_path: Path) -> None:
    watch = DiskWatch(tmp_path, rule="stop")
    watch.require_no_fault()
    assert not watch.wants_stop
    watch.attempt("samples", refuse)
    watch.attempt("samples", lambda: None)
    assert watch.wants_stop
    with pytest.raises(DiskError, match=r"samples: 1 writes failed.*start the same command.*go_on"):
        watch.require_no_fault()


def test_what_is_missing_at_the_end_is_an_error_whatever_the_rule(tmp_path: Path) -> None:
    watch = DiskWatch(tmp_path)
    watch.attempt("export", refuse)
    with pytest.raises(DiskError, match="must take export at the end of the run, got No space left"):
        watch.require_written("export")
    watch.give_up("export", 3, "files")
    assert watch.notes()[0].endswith("the last failed too, 3 are lost")


@pytest.mark.parametrize("is_empty", [True, False], ids=["empty folder under a mount", "no folder"])
def test_a_folder_that_is_gone_is_not_written_into(tmp_path: Path, is_empty: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    watch = DiskWatch(folder, marker=".lock")
    assert watch.attempt("samples", lambda: "written") == "written"
    (folder / ".lock").unlink()
    if not is_empty:
        folder.rmdir()
    assert watch.attempt("samples", lambda: pytest.fail("nothing may be written")) is None
    assert "is its disk mounted?" in watch.notes()[0]


def test_a_mistake_is_no_fault_of_the_disk(tmp_path: Path) -> None:
    def mistake() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        DiskWatch(tmp_path).attempt("samples", mistake)
    with pytest.raises(ValueError, match="a mistake"), disk_required(tmp_path):
        mistake()
    assert is_disk_fault(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_fault(ConfigError("a.yaml: must have room, got No space left on device"))


def test_words_say_where_why_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_disk.shutil, "disk_usage", lambda _: Usage(8_388_608, 0, 4096))
    words = fault_in_words(FULL, tmp_path / "none" / "a")
    assert words == "No space left on device (4,096 of 8,388,608 bytes free)"
    named = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "b"))
    assert str(disk_error(named, tmp_path / "a")).startswith(f"{tmp_path / 'b'}: must take what is written")
    assert str(disk_error(FULL)).startswith("standard output: must take what is written, got No space left")
    said = RuntimeError("OSError: [Errno 28] No space left on device: '/cache/kernel.so'")
    assert str(disk_error(said)).startswith("a disk: must take what is written, got OSError: [Errno 28]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["examples"],
        pytest.param(["plan", "configs/video_vae/tiny.yaml", "--json"], marks=pytest.mark.exhaustive),
    ],
    ids=["at once", "at the end"],
)
def test_an_output_that_is_full_costs_one_line(in_repository_root: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "aiprod_ds", *arguments]
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: standard output: must take what is written, got No space left on device")
