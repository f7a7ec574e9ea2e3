"""The memory of probes: what is known is not looked into again, of many unknown files several are looked into
at once, and a file that crashes FFmpeg costs no more than itself."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from aiprod_ds.data import probe_cache
from aiprod_ds.data.manifest import scan
from aiprod_ds.data.probe_cache import ProbeCache
from aiprod_ds.decode import probe_pool
from aiprod_ds.decode.probe import look_into
from aiprod_ds.decode.probe_pool import ProbePool, default_num_workers, from_json, to_json
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import Coding, corners, write_film, write_sound

_H264 = Coding(codec="libx264", pixel_format="yuv420p")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", [corners(32, 48)] * 3, _H264)


def _linked(film: Path, folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{number:04d}.mp4" for number in range(count)]
    for file in files:
        file.hardlink_to(film)
    return files


def test_what_a_line_holds_is_what_was_found(film: Path, tmp_path: Path) -> None:
    tone = np.full((6, 4800), 0.25, dtype=np.float32)
    sound = write_sound(tmp_path / "x.wav", tone, codec="pcm_s16le", layout="5.1")
    for probed in (look_into(film), look_into(sound, medium="sound")):
        assert from_json(to_json(probed), path=probed.record.path) == probed


@pytest.mark.slow
def test_many_unknown_files_are_looked_into_by_processes(film: Path, tmp_path: Path) -> None:
    files = _linked(film, tmp_path / "set", 40)
    files[5].unlink()
    files[5].write_text("this is no film, it says so in words")
    one_by_one = scan(tmp_path / "set")
    with ProbeCache(tmp_path / "cache.json", num_workers=2) as probes:
        waiting = [probes.begin(file) for file in files]
        found = [wait().record.frames for number, wait in enumerate(waiting) if number != 5]
        with pytest.raises(DataError, match="is no media: it is text"):
            waiting[5]()
    assert found == [record.frames for record in one_by_one.records] == [3] * 39
    again = ProbeCache(tmp_path / "cache.json", num_workers=2)
    assert again.begin(files[39])() == look_into(files[39])
    again._known.close()


def test_processes_find_what_this_one_finds(film: Path, tmp_path: Path) -> None:
    tone = np.full((2, 4800), 0.25, dtype=np.float32)
    sound = write_sound(tmp_path / "x.wav", tone, codec="pcm_s16le", layout="stereo")
    pool = ProbePool(2)
    try:
        futures = [pool.submit(film, "video"), pool.submit(sound, "sound"), pool.submit(sound, "video")]
        assert futures[0].result() == look_into(film)
        assert futures[1].result() == look_into(sound, medium="sound")
        with pytest.raises(DataError, match="holds no video stream"):
            futures[2].result()
    finally:
        pool.close()
        pool.close()


def test_a_file_that_ends_its_process_is_named_and_the_others_go_on(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a crash of FFmpeg: the child kills itself at one name."""
    module = tmp_path / "crashing.py"
    module.write_text(
        "import os, signal\n"
        "from aiprod_ds.decode import probe_pool\n"
        "look = probe_pool.look_into\n"
        "def crash(file, medium):\n"
        "    if 'bad' in file.name: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return look(file, medium=medium)\n"
        "probe_pool.look_into = crash\n"
        "probe_pool._serve()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe_pool, "__name__", "crashing")
    pool = ProbePool(1)
    try:
        futures = [pool.submit(path, "video") for path in (film, tmp_path / "bad.mp4", film)]
        assert futures[0].result() == futures[2].result() == look_into(film)
        with pytest.raises(DataError, match="ended the process that looked into it \\(SIGSEGV\\)"):
            futures[1].result()
    finally:
        pool.close()


@pytest.mark.parametrize("program", ["", "/bin/false", "/no/such/program"])
def test_where_no_process_can_be_started_files_are_looked_into_here(
    film: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    pool = ProbePool(1)
    try:
        assert pool.submit(film, "video").result() == look_into(film)
    finally:
        pool.close()
    assert "files are looked into one by one" in caplog.text


@pytest.mark.parametrize(
    ("variables", "share"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "2"}, 2), ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": "x"}, 1)],
)
def test_the_ranks_of_a_host_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], share: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert default_num_workers() == 12 // share


def test_what_was_found_is_kept_when_a_scan_is_broken_off(film: Path, tmp_path: Path) -> None:
    files = _linked(film, tmp_path / "set", 4)
    cache = tmp_path / "cache.json"
    scan(tmp_path / "set", cache=cache)
    (tmp_path / "new.mp4").hardlink_to(film)

    def broken_off() -> None:
        with ProbeCache(cache) as probes:
            probes.record(tmp_path / "new.mp4")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    kept = cache.read_text()
    assert all(str(file) in kept for file in [*files, tmp_path / "new.mp4"])
    scan(tmp_path / "set", cache=cache)
    assert str(tmp_path / "new.mp4") not in cache.read_text(), "a whole scan forgets what is gone"


def test_a_long_scan_saves_in_between(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cache, "_SAVE_PROBES", 3)
    files = _linked(film, tmp_path / "set", 8)
    cache = tmp_path / "cache.json"
    with ProbeCache(cache, num_workers=1) as probes:
        for file in files:
            probes.record(file)
        assert len(cache.read_text().splitlines()) == 1 + 6
        assert probes.begin(files[0])().record.frames == 3
    assert len(cache.read_text().splitlines()) == 1 + 8
    assert len(list(tmp_path.glob("cache.json*"))) == 1


def test_a_name_that_is_no_text_is_remembered(film: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.mp4")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).hardlink_to(film)
    cache = tmp_path / "cache.json"
    first = scan(tmp_path / "set", cache=cache)
    cache.write_text(cache.read_text().replace('"frames":3', '"frames":99'))
    assert [record.path for record in first.records] == [name]
    assert scan(tmp_path / "set", cache=cache).records[0].frames == 99


def test_a_cache_with_a_torn_line_is_made_anew(
    film: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _linked(film, tmp_path / "set", 2)
    cache = tmp_path / "cache.json"
    whole = scan(tmp_path / "set", cache=cache)
    cache.write_bytes(cache.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert scan(tmp_path / "set", cache=cache) == whole
    assert "probe cache is unreadable and is made anew" in caplog.text
    assert len(cache.read_text().splitlines()) == 3
