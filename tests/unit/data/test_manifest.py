"""Scanning, the unreadable share and the split, on small real files made with PyAV."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from aiprod_ds.data.manifest import (
    ListedClip,
    Manifest,
    Unreadable,
    holdout,
    read_table,
    require_readable,
    scan,
)
from aiprod_ds.data.probe_cache import default_probe_cache
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError
from aiprod_ds.testing.awkward import write_sound


def _write_video(path: Path, *, frames: int, shade: int = 0, fps: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(frames):
            pixels = np.full((16, 32, 3), (shade + 5 * index) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _manifest(shas: str, root: Path = Path("clips")) -> Manifest:
    records = tuple(
        MediaRecord(path=f"{i}.mp4", sha256=sha, frames=9, fps=24.0, height=16, width=32, seconds=9 / 24)
        for i, sha in enumerate(shas)
    )
    return Manifest(root=root, records=records)


def test_a_folder_is_scanned_in_order_with_true_facts(tmp_path: Path) -> None:
    _write_video(tmp_path / "b.mp4", frames=7)
    _write_video(tmp_path / "a" / "c.MP4", frames=48, fps=12)
    (tmp_path / "notes.txt").write_text("no clip")
    manifest = scan(tmp_path)
    assert [(r.path, r.frames, r.fps, r.height, r.width, r.seconds) for r in manifest.records] == [
        ("a/c.MP4", 48, 12.0, 16, 32, 4.0),
        ("b.mp4", 7, 24.0, 16, 32, 7 / 24),
    ]
    assert manifest.unreadable == ()
    assert manifest.records[0].audio_rate_hz is None


def _write_image(path: Path) -> None:
    pixels = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = 6 if path.name.startswith("turned") else 1  # orientation: a quarter turn, or upright
    Image.fromarray(pixels).save(path, exif=exif)


def test_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    names = ["a.jpeg", "b.JPG", "c.png", "d.webp", "frame_%03d.png", "turned.jpg"]
    for name in names:
        _write_image(tmp_path / name)
    manifest = scan(tmp_path)
    assert manifest.unreadable == ()
    assert [(r.path, r.frames, r.height, r.width) for r in manifest.records] == [
        *((name, 1, 16, 32) for name in names[:-1]),
        ("turned.jpg", 1, 32, 16),
    ]


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    _write_video(tmp_path / "elsewhere" / "x.mp4", frames=3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "set")
    assert [record.path for record in scan(tmp_path / "set").records] == ["link/x.mp4"]


def test_what_cannot_be_followed_or_listed_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.mp4", "locked/x.mp4"):
        _write_video(tmp_path / name, frames=3)
    (tmp_path / "a_circle").symlink_to("a_circle")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    manifest = scan(tmp_path)
    assert [record.path for record in manifest.records] == ["b.mp4"]
    assert [(u.path, u.reason) for u in manifest.ignored] == [
        ("a_circle", "cannot be listed (Too many levels of symbolic links)"),
        ("locked/", "cannot be listed (Permission denied)"),
    ]
    assert [u.path for u in manifest.unreadable] == ["gone.mp4"]
    assert "is missing" in manifest.unreadable[0].reason


def test_a_caption_may_hold_any_character(tmp_path: Path) -> None:
    _write_video(tmp_path / "x.mp4", frames=3)
    caption = "one\u2028two\x0bthree\x85four"
    (tmp_path / "clips.csv").write_text(f"video,caption\nx.mp4,{caption}\n", encoding="utf-8")
    manifest = scan(tmp_path / "clips.csv")
    assert [record.caption for record in manifest.records] == [caption]
    assert manifest.unreadable == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "video,caption\na.mp4,hello, world\n",
            "line 2: 3 cells under 2 columns; quote cells that hold commas",
        ),
        ('video,caption\na.mp4,"open\nb.mp4,b\n', "look for quotes that are not closed"),
        ("video,caption,caption\na.mp4,a,b\n", "column 'caption' twice"),
    ],
)
def test_a_csv_that_would_be_read_otherwise_than_written_is_refused(
    table: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "clips.csv").write_text(table, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "clips.csv", "video")


def test_spaces_around_the_columns_of_a_csv_are_no_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text('video , caption\na.mp4,"hello, world"\n\nb.mp4\n', encoding="utf-8")
    assert [(clip.path, clip.caption) for clip in read_table(tmp_path / "clips.csv", "video")] == [
        ("a.mp4", "hello, world"),
        ("b.mp4", None),
    ]


def test_broken_files_are_listed_with_a_reason(tmp_path: Path) -> None:
    _write_video(tmp_path / "good.mp4", frames=3)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(b"this is not a video" * 50)
    manifest = scan(tmp_path)
    assert [r.path for r in manifest.records] == ["good.mp4"]
    assert [u.path for u in manifest.unreadable] == ["empty.mp4", "noise.mp4"]
    assert [u.reason for u in manifest.unreadable] == [
        "is empty (0 bytes)",
        "is no media: it is text that begins with 'this is not a videot'",
    ]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_tables_name_clips_relative_to_their_folder(tmp_path: Path, suffix: str) -> None:
    _write_video(tmp_path / "clips" / "x.mp4", frames=3)
    rows = [{"media_path": "clips/x.mp4", "caption": "a, b"}, {"media_path": "clips/gone.mp4", "caption": ""}]
    text = {
        "csv": 'media_path,caption\nclips/x.mp4,"a, b"\nclips/gone.mp4,\n',
        "json": json.dumps(rows),
        "jsonl": "\n".join(json.dumps(row) for row in rows),
    }[suffix]
    table = tmp_path / f"clips.{suffix}"
    table.write_text(text)
    manifest = scan(table)
    assert manifest.root == tmp_path
    assert [(r.path, r.caption) for r in manifest.records] == [("clips/x.mp4", "a, b")]
    assert [u.path for u in manifest.unreadable] == ["clips/gone.mp4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "must be a readable json table"),
        ("a.json", "{}", "list of rows"),
        ("a.jsonl", '{"film": "x"}', "row 1: must name a file in column 'video'"),
        ("a.yaml", "", "must end in .csv, .json or .jsonl"),
    ],
)
def test_malformed_tables_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        scan(tmp_path / name)


def test_a_table_is_read_without_its_media(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(
        "media_path,caption,audio\ngone.mp4,a film,\nalso/gone.mp4,,gone.wav\n"
    )
    assert read_table(tmp_path / "clips.csv") == [
        ListedClip(path="gone.mp4", caption="a film"),
        ListedClip(path="also/gone.mp4", audio="gone.wav"),
    ]
    assert [clip.path for clip in read_table(tmp_path / "clips.csv", "sound")] == ["gone.mp4", "gone.wav"]


def test_a_missing_source_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: must be a folder"):
        scan(tmp_path / "gone")


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    _write_video(tmp_path / "x.mp4", frames=3)
    (tmp_path / "clips.csv").write_text("video,audio\ngone.mp4,\nx.mp4,gone.wav\n")
    assert {item.path: item.reason for item in scan(tmp_path / "clips.csv").unreadable} == {
        "gone.mp4": "is missing: there is no such file",
        "x.mp4": "its audio file gone.wav is missing: there is no such file",
    }


def test_a_sound_of_its_own_is_probed_once_and_remembered(tmp_path: Path) -> None:
    _write_video(tmp_path / "x.mp4", frames=3)
    tone = np.full((2, 4800), 0.25, dtype=np.float32)
    sound = write_sound(tmp_path / "x.wav", tone, codec="pcm_s16le", layout="stereo")
    (tmp_path / "clips.csv").write_text("video,audio\nx.mp4,x.wav\n")
    cache = tmp_path / "cache.json"
    (record,) = scan(tmp_path / "clips.csv", cache=cache).records
    assert (record.audio_path, record.audio_rate_hz, record.audio_channels) == ("x.wav", 48_000, 2)
    assert record.audio_sha256 == hashlib.sha256(sound.read_bytes()).hexdigest()
    assert (record.audio_peak, record.audio_dc) == (0.25, 0.25)
    cache.write_text(cache.read_text().replace('"audio_peak":0.25', '"audio_peak":0.5'))
    assert scan(tmp_path / "clips.csv", cache=cache).records[0].audio_peak == 0.5


def test_the_cache_serves_unchanged_files_and_notices_changed_ones(tmp_path: Path) -> None:
    clip, cache = tmp_path / "clips" / "a.mp4", tmp_path / "cache.json"
    _write_video(clip, frames=3)
    first = scan(clip.parent, cache=cache)
    cache.write_text(cache.read_text().replace('"frames":3', '"frames":99'))
    assert scan(clip.parent, cache=cache).records[0].frames == 99
    _write_video(clip, frames=5, shade=90)
    second = scan(clip.parent, cache=cache)
    assert second.records[0].frames == 5
    assert second.records[0].sha256 != first.records[0].sha256


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"probed_by": "0"}\n', "{}", '{"probed_by": 1}', "", "\n", "x" * 5000]
)
def test_a_cache_that_cannot_be_believed_is_made_anew(tmp_path: Path, content: str) -> None:
    _write_video(tmp_path / "clips" / "a.mp4", frames=3)
    cache = tmp_path / "cache.json"
    cache.write_text(content)
    assert scan(tmp_path / "clips", cache=cache) == scan(tmp_path / "clips")
    assert len(cache.read_text().splitlines()) == 2


def test_probes_of_another_format_are_taken_again(tmp_path: Path) -> None:
    _write_video(tmp_path / "clips" / "a.mp4", frames=3)
    cache = tmp_path / "cache.json"
    whole = scan(tmp_path / "clips", cache=cache)
    cache.write_text(cache.read_text().replace('"frames":', '"length":9,"frames":'))
    assert scan(tmp_path / "clips", cache=cache) == whole
    assert "length" not in cache.read_text()


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_video(tmp_path / "clips" / "a.mp4", frames=3)
    (tmp_path / "file").touch()
    assert len(scan(tmp_path / "clips", cache=tmp_path / "file" / "cache.json").records) == 1
    assert "probe cache is not written" in caplog.text


def test_every_source_has_a_cache_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIPROD_DS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    one, other = default_probe_cache(tmp_path / "one"), default_probe_cache(tmp_path / "other")
    assert one is not None
    assert other is not None
    assert one.parent == other.parent == tmp_path / "xdg" / "aiprod_ds"
    assert one != other
    monkeypatch.chdir(tmp_path)
    assert default_probe_cache(Path("one")) == one
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_probe_cache(tmp_path / "one") == tmp_path / ".cache" / "aiprod_ds" / one.name
    monkeypatch.setenv("AIPROD_DS_CACHE_DIR", str(tmp_path / "own"))
    assert default_probe_cache(tmp_path / "one") == tmp_path / "own" / one.name


def test_no_home_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    for name in ("AIPROD_DS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_probe_cache(Path("clips")) is None


def test_the_unreadable_share_is_a_limit(tmp_path: Path) -> None:
    broken = (Unreadable(path="bad.mp4", reason="holds no frame"),)
    manifest = Manifest(root=tmp_path, records=_manifest("abcd").records, unreadable=broken)
    require_readable(manifest, 0.2)
    with pytest.raises(DataError, match=r"at most 19% .* got 1 of 5: bad.mp4 \(holds no frame\)"):
        require_readable(manifest, 0.19)
    with pytest.raises(DataError, match="no clip is readable"):
        require_readable(Manifest(root=tmp_path, records=(), unreadable=broken), 1.0)
    with pytest.raises(DataError, match="at least one video clip, got none"):
        require_readable(Manifest(root=tmp_path, records=()), 1.0)


def test_the_split_is_disjoint_complete_and_repeatable() -> None:
    manifest = _manifest("abcdefghij")
    train, validation = holdout(manifest, fraction=0.3, seed=1)
    assert len(validation.records) == 3
    assert {*train.records, *validation.records} == {*manifest.records}
    assert len(train.records) == 7
    assert holdout(manifest, fraction=0.3, seed=1) == (train, validation)
    assert any(holdout(manifest, fraction=0.3, seed=seed)[1] != validation for seed in range(2, 6))


@pytest.mark.parametrize(("fraction", "held"), [(0.0, 1), (1.0, 3)])
def test_each_side_keeps_a_clip(fraction: float, held: int) -> None:
    train, validation = holdout(_manifest("abcd"), fraction=fraction, seed=0)
    assert (len(train.records), len(validation.records)) == (4 - held, held)


def test_copies_stay_on_one_side_and_are_not_two_clips() -> None:
    for seed in range(5):
        train, validation = holdout(_manifest("aabbcc"), fraction=0.3, seed=seed)
        assert not {r.sha256 for r in train.records} & {r.sha256 for r in validation.records}
    with pytest.raises(DataError, match="at least 2 different clips, got 1"):
        holdout(_manifest("aa"), fraction=0.1, seed=0)


def test_images_beside_videos_are_never_held_out() -> None:
    images = tuple(replace(record, frames=1) for record in _manifest("uvwxyz").records)
    videos = _manifest("abcde").records
    for seed in range(5):
        train, validation = holdout(replace(_manifest(""), records=images + videos), fraction=0.4, seed=seed)
        assert len(validation.records) == 2
        assert {*validation.records} <= {*videos}
        assert {*train.records, *validation.records} == {*images, *videos}
    _, validation = holdout(replace(_manifest(""), records=images), fraction=0.5, seed=0)
    assert len(validation.records) == 3
