"""A folder as people have it: every file is trained on as it should be, refused or ignored by name, and what
was done is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aiprod_ds.config.data import AudioDataConfig, VideoDataConfig
from aiprod_ds.data.dataset import ClipRequest
from aiprod_ds.data.manifest import Manifest, Unreadable, scan
from aiprod_ds.data.treatment import (
    audio_notes,
    duplicate_notes,
    ignored_notes,
    picture_notes,
    unreadable_notes,
    usable_pictures,
)
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import Coding, corners, fields, half_transparent, write_film, write_sound
from aiprod_ds.trainers.open_data import open_audio_files, open_video_files

_X264 = {"codec": "libx264", "pixel_format": "yuv420p"}


def _config(**values: Any) -> VideoDataConfig:
    return VideoDataConfig(train="clips", **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("awkward") / "clips"
    (path / ".trash").mkdir(parents=True)
    plain = write_film(path / "plain.mp4", [corners(32, 48)] * 12, Coding(**_X264))
    write_film(path / "turned.mp4", [corners(32, 48)] * 12, Coding(**_X264, turn=(90, False, False)))
    woven = Coding(**_X264, options={"x264-params": "tff=1"})
    write_film(path / "woven.mp4", [fields(index, 32, 96) for index in range(12)], woven)
    tags = {"color_range": 1, "color_trc": 16, "color_primaries": 9, "colorspace": 9}
    hdr = Coding(codec="libx264", pixel_format="yuv420p10le", tags=tags)
    write_film(path / "bright.mp4", [corners(32, 64)] * 12, hdr)
    write_film(path / "dark.mp4", [corners(32, 80)] * 12, hdr)
    Image.fromarray(half_transparent(32, 48)).save(path / "seal.png")
    for name in ("._plain.mp4", ".trash/old.mp4"):
        (path / name).write_bytes(b"\0" * 100)
    (path / "loading.mp4.part").write_bytes(plain.read_bytes()[:500])
    (path / "phone.heic").write_bytes(b"0")
    (path / "notes.txt").write_text("no media, and not named as such")
    (path / "empty.mp4").touch()
    (path / "cut.mp4").write_bytes(plain.read_bytes()[:-400])
    (path / "indexless.mp4").write_bytes(_without_index(plain.read_bytes()))
    swift = Coding(**_X264, container_options={"movflags": "faststart"})
    film = write_film(path / "swift.mp4", [corners(32, 48)] * 24, swift).read_bytes()
    (path / "swift.mp4").write_bytes(film[:-100])
    (path / "page.mp4").write_text("<!DOCTYPE html><title>Not found</title>")
    (path / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (path / "reserved.mp4").write_bytes(bytes(4096))
    return path


def _without_index(film: bytes) -> bytes:
    at = film.index(b"moov") - 4
    return film[:at]


def test_files_that_cannot_be_clips_are_told_apart(folder: Path) -> None:
    manifest = scan(folder)
    assert [record.path for record in manifest.records] == [
        "bright.mp4",
        "dark.mp4",
        "plain.mp4",
        "seal.png",
        "turned.mp4",
        "woven.mp4",
    ]
    reasons = {item.path: item.reason for item in manifest.unreadable}
    assert reasons["empty.mp4"] == "is empty (0 bytes)"
    assert reasons["cut.mp4"].startswith("is incomplete: ")
    assert reasons["indexless.mp4"] == "is incomplete: it has no index (moov), which recorders write last"
    assert reasons["page.mp4"] == "is no media: it is text that begins with '<!DOCTYPE html><titl'"
    assert reasons["pointer.mp4"] == "is no media: it is a Git LFS pointer in place of the file"
    assert reasons["reserved.mp4"].startswith("is incomplete: it begins with zeros")
    assert reasons["swift.mp4"].startswith("is incomplete: ")
    assert len(reasons) == 7
    assert {item.path: item.reason for item in manifest.ignored} == {
        "._plain.mp4": "hidden",
        ".trash/old.mp4": "hidden",
        "loading.mp4.part": "not whole yet",
        "phone.heic": "of a kind that is not read, convert it",
    }
    assert ignored_notes(manifest) == (
        "2 files ignored, hidden: ._plain.mp4, .trash/old.mp4",
        "1 file ignored, not whole yet: loading.mp4.part",
        "1 file ignored, of a kind that is not read, convert it: phone.heic",
    )


def test_what_is_done_with_pictures_is_told(folder: Path) -> None:
    assert picture_notes(scan(folder).records, _config(alpha_background=(255, 255, 255))) == (
        "1 file deinterlaced (bwdif): woven.mp4",
        "2 files tone-mapped from HDR (PQ): bright.mp4, dark.mp4",
        "1 file turned or mirrored upright: turned.mp4",
        "1 file composited on the color 255, 255, 255: seal.png",
    )


def test_settings_leave_files_out_by_name(folder: Path) -> None:
    found = scan(folder)
    assert usable_pictures(found, _config()) == found
    left = usable_pictures(found, _config(interlaced="leave_out", hdr="leave_out"))
    assert [record.path for record in left.records] == ["plain.mp4", "seal.png", "turned.mp4"]
    assert {item.path: item.reason for item in left.ignored if "leave_out" in item.reason} == {
        "bright.mp4": "is HDR, PQ (data.hdr: leave_out)",
        "dark.mp4": "is HDR, PQ (data.hdr: leave_out)",
        "woven.mp4": "is interlaced (data.interlaced: leave_out)",
    }
    assert left.unreadable == found.unreadable


def test_a_run_says_what_it_does_and_has_the_background(folder: Path) -> None:
    config = VideoDataConfig(
        train=str(folder), max_unreadable_fraction=0.6, interlaced="leave_out", alpha_background=(0, 0, 255)
    )
    data = open_video_files(config, seed=0)
    assert "1 file ignored, is interlaced (data.interlaced: leave_out): woven.mp4" in data.notes
    assert "2 files tone-mapped from HDR (PQ): bright.mp4, dark.mp4" in data.notes
    names = [clip.name for clip in data.train_clips]
    (bucket_index,) = (index for index, name in enumerate(names) if name == "seal.png")
    request = ClipRequest(sample_index=bucket_index, epoch=0, frames=1, height=32, width=48, augment=False)
    video_CTHW = data.train[request]["video"]
    assert video_CTHW[:, 0, 0, 0].tolist() == [-1.0, -1.0, 1.0]


def _sounds(path: Path) -> Path:
    path.mkdir()
    rate_hz = 44_100
    seconds = np.arange(rate_hz) / rate_hz
    sine = np.sin(2 * np.pi * 220 * seconds).astype(np.float32)

    def write(name: str, wave_CN: np.ndarray, layout: str, rate: int = rate_hz) -> None:
        write_sound(path / name, wave_CN, codec="pcm_s16le", layout=layout, rate_hz=rate)

    write("plain.wav", 0.5 * np.stack([sine, -sine]), "stereo")
    write("mono.wav", 0.5 * sine[None], "mono")
    write("slow.wav", 0.4 * np.stack([sine, sine]), "stereo", 22_050)
    write("cinema.wav", 0.1 * np.tile(sine, (6, 1)), "5.1")
    write("silent.wav", np.zeros((2, rate_hz)), "stereo")
    write("clipped.wav", np.stack([2 * sine, 0.1 * sine]).clip(-1, 1), "stereo")
    write("shifted.wav", 0.2 * np.stack([sine, sine]) + [[0.0], [0.05]], "stereo")
    # Reaches full scale for one sample at a time, which is no clipping.
    write("touching.wav", np.stack([0.9 * sine, np.eye(1, rate_hz, 100)[0]]), "stereo")
    return path


def test_what_is_done_with_sounds_is_told_and_odd_ones_are_counted(tmp_path: Path) -> None:
    config = AudioDataConfig(train=str(_sounds(tmp_path / "sounds")), sample_rate_hz=44_100, channels=2)
    manifest = scan(Path(config.train), medium="sound")
    assert audio_notes(manifest.records, config) == (
        "1 sound resampled to 44100 Hz: slow.wav",
        "1 sound mixed down from more than two channels (ITU-R BS.775): cinema.wav",
        "1 sound mono, repeated for two channels: mono.wav",
        "1 sound silent (peak below -90 dB): silent.wav",
        "1 sound clipped (three or more samples at full scale in a row): clipped.wav",
        "1 sound with a mean (DC) beyond 0.01: shifted.wav",
    )
    records = {record.path: record for record in manifest.records}
    # Oracle: 2 sin exceeds 1 in two thirds of the time.
    assert records["clipped.wav"].audio_clipped == pytest.approx(44_100 * 2 / 3, rel=0.01)
    assert records["shifted.wav"].audio_dc == pytest.approx(0.05, abs=1e-4)
    assert records["cinema.wav"].audio_layout == "5.1"
    assert open_audio_files(config, seed=0).notes[0] == "1 sound resampled to 44100 Hz: slow.wav"


def test_a_film_with_something_behind_it_is_whole(tmp_path: Path) -> None:
    path = write_film(tmp_path / "film.mp4", [corners(32, 48)] * 4, Coding(**_X264))
    whole = path.read_bytes()
    for tail in (b"\0" * 16, b"made by a camera", b"\0\0\0\x08free"):
        path.write_bytes(whole + tail)
        assert scan(tmp_path).unreadable == ()


def _record(path: str, sha256: str) -> MediaRecord:
    return MediaRecord(path=path, sha256=sha256, frames=9, fps=24.0, height=16, width=16, seconds=9 / 24)


def test_doubles_are_found_by_content(tmp_path: Path) -> None:
    contents = {"a.mp4": "x", "b.mp4": "y", "c.mp4": "x", "d.mp4": "z"}
    train = Manifest(root=tmp_path, records=tuple(_record(*item) for item in contents.items()))
    validation = replace(train, records=(_record("v.mp4", "z"), _record("w.mp4", "q")))
    assert duplicate_notes(train, validation) == (
        "1 clip held out and trained on at once, by content: v.mp4 = d.mp4",
        "1 clip in training more than once, by content: a.mp4 = c.mp4",
    )
    assert duplicate_notes(replace(train, records=train.records[:2]), validation) == ()


@pytest.mark.parametrize("setting", ["allow", "warn", "error"])
def test_doubles_are_allowed_told_or_an_error(tmp_path: Path, setting: str) -> None:
    film = write_film(tmp_path / "train" / "a.mp4", [corners(32, 48)] * 4, Coding(**_X264))
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "b.mp4").write_bytes(film.read_bytes())
    config = VideoDataConfig(
        train=str(tmp_path / "train"),
        validation=str(tmp_path / "validation"),
        duplicates=setting,  # type: ignore[arg-type]
    )
    held_out, trained_on = tmp_path / "validation" / "b.mp4", tmp_path / "train" / "a.mp4"
    leak = f"1 clip held out and trained on at once, by content: {held_out} = {trained_on}"
    if setting == "error":
        with pytest.raises(DataError, match=rf"no clip twice \(data\.duplicates: error\), got {leak}"):
            open_video_files(config, seed=0)
        return
    assert (leak in open_video_files(config, seed=0).notes) == (setting == "warn")


def test_what_cannot_be_read_is_told_by_name() -> None:
    manifest = Manifest(
        root=Path("clips"), records=(), unreadable=(Unreadable(path="a.mp4", reason="is empty (0 bytes)"),)
    )
    assert unreadable_notes(manifest) == ("1 file left out that cannot be read: a.mp4 (is empty (0 bytes))",)
    assert unreadable_notes(replace(manifest, unreadable=())) == ()
