"""The end of a command by an error that nobody foresaw: what its user sees, what is kept, once for all
ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aiprod_ds.crash import UNFORESEEN, guarded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _fails() -> int:
    raise KeyError("what\nis\nthis")


def test_three_lines_a_file_and_a_code_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(_fails, program="aiprod-ds") == UNFORESEEN == 70
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == r"error: aiprod-ds met an error that it does not foresee: KeyError: 'what\nis\nthis'"
    assert re.fullmatch(r"  where: .*test_crash\.py:\d+ in _fails", second)
    found = re.fullmatch(r"  The whole traceback is in (\S+\.txt)\. Please report it .*", third)
    assert found is not None
    kept = Path(found[1]).read_text()
    assert kept.startswith("aiprod-ds: KeyError")
    assert "Traceback (most recent call last)" in kept
    assert Path(found[1]).stat().st_mode & 0o777 == 0o600


def test_verbose_prints_the_traceback_too(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(_fails, program="aiprod-ds", is_verbose=True)
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_of_ranks_that_fail_alike_one_tells(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert guarded(_fails, program="aiprod-ds") == UNFORESEEN
        told.append(capsys.readouterr().err)
    assert "rank 1: KeyError" in told[0]
    assert told[1] == ""
    assert len(list(folder.iterdir())) == 1


def test_without_room_for_the_file_the_traceback_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    assert guarded(_fails, program="aiprod-ds") == UNFORESEEN
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "could not be written to a file (No such file or directory)" in err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_on_purpose_passes(kind: type[BaseException]) -> None:
    def ends() -> int:
        raise kind(3)

    with pytest.raises(kind):
        guarded(ends, program="aiprod-ds")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys\nfrom aiprod_ds.crash import guarded\n"
        "sys.exit(guarded(lambda: print('line\\n' * 100_000) or 0, program='aiprod-ds'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_text_that_is_no_text_is_printed_as_it_can_be() -> None:
    code = (
        "import sys\nfrom aiprod_ds.crash import guarded\n"
        "sys.exit(guarded(lambda: print('a\\udcffb') or 0, program='aiprod-ds'))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout == b"a\\udcffb\n"
