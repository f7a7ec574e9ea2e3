"""What the command `data` says of a folder as people have it: the facts of every file, what becomes of it,
and which files are none, each with its reason."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiprod_ds.cli import main
from aiprod_ds.data.probe_cache import ProbeCache
from aiprod_ds.decode.record import Medium, Probed
from aiprod_ds.survey.demands import Demands
from aiprod_ds.survey.page import MAX_ROWS, PageRows
from aiprod_ds.survey.rows import CSV_COLUMNS, Row, aspect_words
from aiprod_ds.survey.run import survey
from aiprod_ds.testing.awkward import Coding, corners, write_film, write_sound

from .conftest import Surveyed

_H264 = Coding(codec="libx264", pixel_format="yuv420p")
_FACTS: dict[str, dict[str, Any]] = {
    "plain.mp4": {"kind": "film", "width": 64, "height": 48, "aspect": "4:3", "rate_hz": 25.0, "frames": 12},
    "pal.mp4": {"width": 128, "height": 48, "stored_width": 90, "stored_height": 48, "pixel_aspect": 1.4222},
    "turned 90.mp4": {"width": 64, "height": 48, "stored_width": 48, "rotation_degrees": 90},
    "selfie.mov": {"mirrored": True, "rotation_degrees": 0},
    "photo.jpg": {"kind": "picture", "width": 64, "height": 48, "rotation_degrees": 270, "rate_hz": 0.0},
    "cropped.mkv": {"width": 64, "height": 48, "stored_width": 96, "stored_height": 64, "cropped": True},
    "woven.mp4": {"interlaced": True},
    "variable.mkv": {"variable_rate": True},
    "bright pq.mp4": {"hdr": "pq", "color_matrix": "bt2020", "color_range": "limited"},
    "bright hlg.mp4": {"hdr": "hlg", "pixel_format": "yuv444p10le"},
    "full range.mp4": {"color_range": "full"},
    "broadcast.mp4": {"color_range": "limited", "color_matrix": "bt601"},
    "deep.mp4": {"codec": "hevc", "pixel_format": "yuv420p10le"},
    "web.webm": {"codec": "vp9", "container": "matroska"},
    "logo.png": {"kind": "picture", "alpha": True},
    "seal.webm": {"kind": "film", "alpha": True},
    "tall.mp4": {"aspect": "1:2", "width": 48, "height": 96},
    "song.flac": {"kind": "sound", "audio_rate_hz": 48_000, "audio_layout": "stereo", "seconds": 0.5},
    "surround.wav": {"kind": "sound", "audio_channels": 6, "audio_layout": "5.1"},
}
_FINDINGS = {
    "plain.mp4": [],
    "woven.mp4": ["interlaced"],
    "variable.mkv": ["variable_rate"],
    "bright pq.mp4": ["hdr"],
    "bright hlg.mp4": ["hdr"],
    "logo.png": ["alpha"],
    "pal.mp4": ["stretched"],
    "turned and squeezed.mp4": ["stretched", "turned"],
    "cropped.mp4": ["cropped"],
    "surround.wav": ["mixed_down"],
    "silence.wav": ["silent"],
    "loud.wav": ["clipped"],
    "zz copy.mp4": ["duplicate"],
    "empty.mp4": ["empty"],
    "cut.mp4": ["incomplete"],
    "no index.mp4": ["incomplete"],
    "reserved.mp4": ["incomplete"],
    "page.mp4": ["no_media"],
    "pointer.mp4": ["no_media"],
}


@pytest.mark.parametrize("path", _FACTS)
def test_the_facts_of_a_file_are_true(surveyed: Surveyed, path: str) -> None:
    found = surveyed.file(path)
    assert {name: found[name] for name in _FACTS[path]} == _FACTS[path]


@pytest.mark.parametrize("path", _FINDINGS)
def test_what_becomes_of_a_file_is_told(surveyed: Surveyed, path: str) -> None:
    assert surveyed.kinds(path) == _FINDINGS[path]


def test_every_file_that_can_be_trained_on_has_its_displayed_size(surveyed: Surveyed) -> None:
    for path, clip in surveyed.truth.clips.items():
        found = surveyed.file(path)
        assert (found["height"], found["width"]) == clip.size, path
        assert found["buckets"], path
        assert found["level"] != "left_out", path
    for path, reason in surveyed.truth.unreadable.items():
        (finding,) = surveyed.file(path)["findings"]
        assert reason in finding["text"]
        assert finding["effect"] == "left out"
        assert finding["advice"]


def test_ignored_files_are_told_apart(surveyed: Surveyed) -> None:
    reasons = {item["path"]: item["reason"] for item in surveyed.document["ignored"]}
    assert reasons == surveyed.truth.ignored | {
        "notes.txt": "text without a clip",
        "plain.txt": "caption of a clip",
        "film.part": "not whole yet",
        "clip.mkv.crdownload": "not whole yet",
        "nothing.bin": "no media by name",
    }


def test_the_caption_and_the_copy_of_a_file_are_named(surveyed: Surveyed) -> None:
    found = surveyed.file("plain.mp4")
    assert (found["captions"], found["caption"]) == (1, "four quarters, each of one color")
    assert surveyed.file("zz copy.mp4")["duplicate_of"] == "plain.mp4"
    assert surveyed.document["copies"] == 1


def test_the_document_counts_what_it_lists(surveyed: Surveyed) -> None:
    document = surveyed.document
    files, summary = document["files"], document["summary"]
    assert document["format"] == 1
    assert document["source"] == str(surveyed.folder)
    assert document["configuration"] is None
    assert summary["files"] == len(files)
    assert sum(summary["used"].values()) == sum(file["level"] != "left_out" for file in files)
    assert sum(summary["levels"].values()) == len(files)
    assert summary["bytes"] == sum(file["num_bytes"] for file in files)
    seconds = sum(file["seconds"] for file in files if file["level"] != "left_out")
    assert summary["hours"] == pytest.approx(seconds / 3600)
    for kind, problem in summary["problems"].items():
        having = [file["path"] for file in files if kind in [found["kind"] for found in file["findings"]]]
        assert problem["count"] == len(having)
        assert problem["examples"] == having[:5]
    for title, counts in summary["histograms"].items():
        assert sum(counts.values()) > 0, title
    assert summary["histograms"]["Aspect ratio as displayed"]["4:3"] >= 20
    assert sum(summary["buckets"]["buckets: auto"].values()) == sum(file["height"] > 0 for file in files)


def test_the_csv_has_a_line_for_each_file(surveyed: Surveyed) -> None:
    with (surveyed.output / "files.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert [line["path"] for line in lines] == [file["path"] for file in surveyed.document["files"]]
    (woven,) = (line for line in lines if line["path"] == "woven.mp4")
    assert (woven["interlaced"], woven["level"]) == ("yes", "treated")
    assert woven["problems"] == "interlaced: deinterlaced (bwdif)"


def test_the_page_shows_every_file_and_the_clips(surveyed: Surveyed) -> None:
    page = (surveyed.output / "report.html").read_text(encoding="utf-8")
    assert page.count('<tr class="') == len(surveyed.document["files"])
    assert page.count('<figure class="tile"') == sum(
        file["height"] > 0 for file in surveyed.document["files"]
    )
    assert "6 files cannot be used" in page
    assert "two\nlines.mp4" in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_summary_says_what_to_do_next(
    surveyed: Surveyed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(surveyed.folder), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "6 cannot" in said
    assert "deinterlaced (bwdif)" in said
    assert "hidden (2)" in said
    assert f"page:  {tmp_path / 'report.html'}" in said
    assert f"next:  aiprod-ds data {surveyed.folder} --config CONFIG" in said


def test_json_alone_writes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "clips" / "a.mp4", [corners(32, 48)] * 3, _H264)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "clips", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [file["path"] for file in document["files"]] == ["a.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]
    assert main(["data", "clips"]) == 0
    assert sorted(path.name for path in (tmp_path / "clips_survey").iterdir()) == ["files.csv", "report.html"]


def test_a_folder_is_surveyed_from_inside_and_nothing_is_written_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "my.clips" / "a.mp4", [corners(32, 48)] * 3, _H264)
    monkeypatch.chdir(tmp_path / "my.clips")
    assert main(["data", "."]) == 0
    assert [path.name for path in Path().iterdir()] == ["a.mp4"]
    assert str(tmp_path / "my.clips_survey" / "report.html") in capsys.readouterr().out


@pytest.mark.slow
def test_a_configuration_says_what_is_asked(
    tmp_path: Path, in_repository_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    write_film(folder / "short.mp4", [corners(32, 48)] * 3, _H264)
    write_film(folder / "long.mp4", [corners(96, 160)] * 30, _H264)
    woven = Coding(codec="libx264", pixel_format="yuv420p", options={"x264-params": "tff=1"})
    write_film(folder / "woven.mp4", [corners(96, 128)] * 30, woven)
    (folder / "song.wav").write_bytes(b"")
    phases = (
        "[{name: low, resolution: 32x32, duration: {frames: 5}, updates: 1, learning_rate: 1e-4, "
        "global_batch_size: 1}, {name: high, resolution: 64x64, duration: {frames: 17}, updates: 1, "
        "learning_rate: 1e-4, global_batch_size: 1}]"
    )
    arguments = ["data", str(folder), "--config", "configs/video_vae/tiny.yaml", "--json", "-"]
    arguments += ["--set", f"curriculum.phases={phases}", "--set", "data.interlaced=leave_out"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    files = {file["path"]: file for file in document["files"]}
    assert {path: [found["kind"] for found in file["findings"]] for path, file in files.items()} == {
        "long.mp4": [],
        "short.mp4": ["too_short"],
        "woven.mp4": ["setting"],
    }
    assert list(files["long.mp4"]["buckets"]) == ["low", "high"]
    assert files["long.mp4"]["buckets"]["high"] == "64x64, 17 frames"
    assert files["woven.mp4"]["buckets"] == {}
    assert document["ignored"] == [
        {"path": "song.wav", "reason": "a sound, which this configuration does not take"}
    ]


def test_a_configuration_of_sounds_looks_at_sounds(
    tmp_path: Path, in_repository_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    seconds = np.arange(96_000) / 48_000
    tone = (0.4 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    write_sound(folder / "a.wav", np.stack([tone, tone]), codec="pcm_s16le", layout="stereo")
    write_film(folder / "film.mp4", [corners(32, 48)] * 3, _H264)
    assert main(["data", str(folder), "--config", "configs/audio_vae/tiny.yaml", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    files = {file["path"]: file for file in document["files"]}
    assert [found["kind"] for found in files["film.mp4"]["findings"]] == ["no_sound"]
    assert files["a.wav"]["kind"] == "sound"
    assert files["a.wav"]["buckets"]
    assert document["summary"]["used"] == {"sound": 1}


def test_a_table_names_clips_captions_and_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_film(tmp_path / "a.mp4", [corners(32, 48)] * 3, _H264)
    tone = np.full((2, 4_800), 0.001, dtype=np.float32)
    write_sound(tmp_path / "a.wav", tone, codec="pcm_s16le", layout="stereo", rate_hz=44_100)
    write_film(tmp_path / "b.mp4", [corners(48, 32)] * 3, _H264)
    table = tmp_path / "clips.csv"
    table.write_text("video,audio,caption\na.mp4,a.wav,one\nb.mp4,,\ngone.mp4,,\n")
    assert main(["data", str(table), "--json", "-"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [(file["path"], file["audio_path"], file["audio_rate_hz"]) for file in files] == [
        ("a.mp4", "a.wav", 44_100),
        ("b.mp4", "", 0),
        ("gone.mp4", "", 0),
    ]
    kinds = [[found["kind"] for found in file["findings"]] for file in files]
    assert kinds == [[], ["no_caption"], ["missing"]]


def test_a_film_of_sound_alone_is_a_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tone = np.full((2, 48_000), 0.001, dtype=np.float32)
    write_sound(tmp_path / "voice.mp4", tone, codec="aac", layout="stereo")
    assert main(["data", str(tmp_path), "--json", "-"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["kind"], file["audio_layout"]) == ("sound", "stereo")


def test_a_clip_that_is_damaged_in_the_middle_is_found_by_the_contact_sheet(tmp_path: Path) -> None:
    film = write_film(
        tmp_path / "clips" / "a.mp4",
        [np.random.default_rng(index).integers(0, 255, (64, 96, 3), dtype=np.uint8) for index in range(30)],
        _H264,
    )
    data = bytearray(film.read_bytes())
    data[len(data) // 4 : 3 * len(data) // 4] = bytes(len(data) // 2)
    film.write_bytes(bytes(data))
    document = tmp_path / "survey.json"
    arguments = ["data", str(film.parent), "--output", str(tmp_path / "page"), "--json", str(document)]
    assert main(arguments) == 0
    (file,) = json.loads(document.read_text())["files"]
    assert [found["kind"] for found in file["findings"]] == ["damaged"]


def test_a_name_that_is_no_text_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = write_film(tmp_path / "clips" / "a.mp4", [corners(32, 48)] * 3, _H264)
    film.rename(film.with_name(os.fsdecode(b"\xff.mp4")))
    assert main(["data", str(film.parent), "--output", str(tmp_path / "page")]) == 0
    assert "\\udcff.mp4" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "\\udcff.mp4" in (tmp_path / "page" / "files.csv").read_text(encoding="utf-8")
    capsys.readouterr()


def test_nothing_that_can_be_used_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.mp4").touch()
    assert main(["data", str(tmp_path), "--json", "-"]) == 1
    assert main(["data", str(tmp_path / "gone"), "--json", "-"]) == 1
    assert "must be a folder or a CSV, JSON or JSONL table, got nothing there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "a=1"], "--set: has no effect without --config"),
        (["--output", "/proc/nowhere"], "--output: must be a folder that can be made and written into"),
        (["--json", "/proc/nowhere/x"], "--json: must be a file that can be written"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (1920, 1080, "16:9"),
        (1080, 1920, "9:16"),
        (854, 480, "16:9"),
        (1000, 620, "1.61:1"),
        (300, 900, "1:3.00"),
    ],
)
def test_aspects_in_words(width: int, height: int, words: str) -> None:
    assert aspect_words(width, height) == words


class _Counting:
    """Counts what writers are given, by how they are told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def row(self, _: Row) -> None:
        self.counts["rows"] += 1

    def ignored(self, _path: str, _reason: str) -> None:
        self.counts["ignored"] += 1


@pytest.mark.slow
def test_encoding_says_which_captions_are_missing_and_finds_its_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    for name, size in {"wide.mp4": (48, 96), "tall.mp4": (96, 48)}.items():
        write_film(folder / name, [corners(*size)] * 9, _H264)
    (folder / "wide.txt").write_text("a wide one")
    run = tmp_path / "train.yaml"
    run.write_text(
        "curriculum: {phases: [{name: only, resolution: 32x32, duration: {frames: 9}, buckets: auto, "
        "updates: 1, learning_rate: 1.0e-4, global_batch_size: 1}]}\n"
    )
    encode = tmp_path / "encode.yaml"
    encode.write_text(
        f"data: {{media: {folder}}}\n"
        "video: {model: {source: 'aiprod_ds.testing.tiny:TinyVideoVAE'}, precision: fp32}\n"
        "text: {source: T5EncoderModel, precision: fp32, config: {vocab_size: 259, d_model: 32, d_kv: 16, "
        "d_ff: 64, num_layers: 1, num_heads: 2}}\n"
        f"curriculum: {run}\n"
    )
    assert main(["data", str(folder), "--config", str(encode), "--json", "-"]) == 0
    files = {file["path"]: file for file in json.loads(capsys.readouterr().out)["files"]}
    assert [found["kind"] for found in files["tall.mp4"]["findings"]] == ["no_caption_left_out"]
    assert files["wide.mp4"]["findings"] == []
    (height, width), length = _shape(files["wide.mp4"]["buckets"]["only"])
    assert height < width
    assert length == "9 frames"
    with_default = ["--set", "text.default_caption=a clip"]
    assert main(["data", str(folder), "--config", str(encode), *with_default, "--json", "-"]) == 0
    files = {file["path"]: file for file in json.loads(capsys.readouterr().out)["files"]}
    assert files["tall.mp4"]["findings"] == []
    (height, width), _ = _shape(files["tall.mp4"]["buckets"]["only"])
    assert height > width


def _shape(words: str) -> tuple[tuple[int, int], str]:
    size, _, length = words.partition(", ")
    height, width = map(int, size.split("x"))
    return (height, width), length


@pytest.mark.slow
def test_two_thousand_files_are_looked_into_once_and_no_row_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing is looked into; no more rows are alive at a time than wait for processes."""
    film = write_film(tmp_path / "film.mp4", [corners(32, 48)] * 3, _H264)
    folder = tmp_path / "clips"
    for number in range(2_000):
        link = folder / f"{number // 100:02d}" / f"{number:04d}.mp4"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(film)
        if number % 4 == 0:
            link.with_suffix(".part").touch()
    alive, most, looks = 0, 0, 0
    make_row, submit = Row.__init__, ProbeCache._submit

    def counted_row(self: Row, *arguments: Any, **values: Any) -> None:
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        make_row(self, *arguments, **values)

    def counted_end(_: Row) -> None:
        nonlocal alive
        alive -= 1

    def counted_look(self: ProbeCache, file: Path, medium: Medium) -> Future[Probed]:
        nonlocal looks
        looks += 1
        return submit(self, file, medium)

    monkeypatch.setattr(Row, "__init__", counted_row)
    monkeypatch.setattr(Row, "__del__", counted_end, raising=False)
    monkeypatch.setattr(ProbeCache, "_submit", counted_look)
    for _ in range(2):
        writer = _Counting()
        with (tmp_path / "spool").open("w+") as spool:
            found = survey(folder, Demands(), spool=spool, writers=(writer,))
        assert writer.counts == {"rows": 2_000, "ignored": 500}
        assert (found.tally.num_used, found.num_copies) == (2_000, 1_999)
    assert looks == 2_000
    assert 0 < most < 200


def test_the_page_keeps_as_many_rows_as_it_shows() -> None:
    rows = PageRows()
    for number in range(3 * MAX_ROWS):
        rows.row(Row(path=f"{number}.mp4", kind="film"))
    assert len(rows.chosen()) == MAX_ROWS
    assert rows.num_all == 3 * MAX_ROWS
