"""Captions in every form in which people keep them, and what is said of files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiprod_ds.data.captions import CaptionFinder, captions_in_row, with_captions, with_trigger
from aiprod_ds.data.manifest import ListedClip, Manifest, read_table, require_readable, scan
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError


def _record(path: str, caption: str | None = None) -> MediaRecord:
    return MediaRecord(
        path=path, sha256=path, frames=1, fps=1.0, height=1, width=1, seconds=1.0, caption=caption
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": " a dog \n"}, ("a dog",)),
        ({"a.txt": "a dog\nruns"}, ("a dog\nruns",)),
        ({"a.caption": "a dog"}, ("a dog",)),
        ({"a.mp4.txt": "a dog"}, ("a dog",)),
        ({"a.txt": "\ufeffa dog"}, ("a dog",)),
        ({"a.txt": "first", "a.caption": "second"}, ("first",)),
        ({"a.txt": " \n", "a.caption": "second"}, ("second",)),
        ({"captions.json": '{"a.mp4": "a dog", "b.mp4": "a cat"}'}, ("a dog",)),
        ({"captions.json": '{"a.mp4": ["a dog", "it runs", ""]}'}, ("a dog", "it runs")),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "a dog"}\n'}, ("a dog",)),
        ({"metadata.csv": "file_name,prompt\n./a.mp4,a dog\n"}, ("a dog",)),
        ({"../metadata.csv": 'file_name,text\nsub/a.mp4,"a dog, running"\n'}, ("a dog, running",)),
        ({"a.txt": "first", "metadata.csv": "file_name,text\na.mp4,second\n"}, ("first",)),
        ({"b.txt": "of another"}, ()),
        ({"a.txt": ""}, ()),
        ({}, ()),
    ],
)
def test_files_hold_captions(tmp_path: Path, files: dict[str, str], expected: tuple[str, ...]) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in files.items():
        (tmp_path / "sub" / name).write_text(text, encoding="utf-8")
    assert CaptionFinder(tmp_path)("sub/a.mp4") == expected


def test_lines_are_captions_of_their_own_if_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog\r\n\n  it runs\u2028fast\n")
    assert CaptionFinder(tmp_path, a_line_each=True)("a.mp4") == ("a dog", "it runs\u2028fast")
    assert CaptionFinder(tmp_path)("a.mp4") == ("a dog\n\n  it runs\u2028fast",)


def test_tables_above_the_root_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\nroot/a.mp4,a dog\n")
    (tmp_path / "root").mkdir()
    assert CaptionFinder(tmp_path / "root")("a.mp4") == ()
    assert CaptionFinder(tmp_path / "root")("../root/a.mp4") == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a\.txt: must be a readable text file"),
        ("captions.json", b"[1]", r"captions\.json: must be a table of captions"),
        (
            "captions.json",
            b'{"a.mp4": 1}',
            r"captions\.json: .*a\.mp4 must be text or a list of texts, got 1",
        ),
        ("metadata.jsonl", b"{", r"metadata\.jsonl: must be a table of captions"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        CaptionFinder(tmp_path)("a.mp4")
    found, problems = with_captions(Manifest(root=tmp_path, records=(_record("a.mp4"),)))
    assert found.records[0].captions == ()
    assert name in problems["a.mp4"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"caption": "a dog"}, ("a dog",)),
        ({"captions": ["a dog", "it runs"]}, ("a dog", "it runs")),
        ({"caption": ["a dog", " "]}, ("a dog",)),
        ({"text": "a dog"}, ("a dog",)),
        ({"prompt": "a dog", "caption": ""}, ("a dog",)),
        ({"caption": "first", "text": "second"}, ("first",)),
        ({"caption": "  "}, ()),
        ({"caption": None}, ()),
        ({}, ()),
    ],
)
def test_rows_hold_captions(row: dict[str, object], expected: tuple[str, ...]) -> None:
    assert captions_in_row(row) == expected


@pytest.mark.parametrize("column", ["video", "media_path", "video_path", "image_path", "file_name", "path"])
def test_tables_name_clips_as_peers_do(tmp_path: Path, column: str) -> None:
    row = {column: "a.mp4", "text": ["a dog", "it runs"]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_table(tmp_path / "a.json") == [
        ListedClip(path="a.mp4", caption="a dog", more_captions=("it runs",))
    ]


def test_a_caption_that_is_no_text_is_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"video": "a.mp4", "caption": 3}]')
    with pytest.raises(DataError, match=r"a\.json: row 1: caption must be text or a list of texts, got 3"):
        read_table(tmp_path / "a.json")


def test_the_rows_own_caption_comes_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("from a file")
    records = (_record("a.mp4", "from a row"), _record("b.mp4"), _record("c.mp4"))
    found, problems = with_captions(Manifest(root=tmp_path, records=records))
    assert [record.captions for record in found.records] == [("from a row",), ("from a file",), ()]
    assert problems == {}


def test_a_trigger_word_stands_before_every_caption() -> None:
    assert with_trigger(("a dog", "a cat"), "sks,") == ("sks, a dog", "sks, a cat")
    assert with_trigger(("",), "sks") == ("sks",)
    assert with_trigger(("a dog",), None) == ("a dog",)


def test_missing_files_are_not_called_unreadable(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    (tmp_path / "a.csv").write_text("video\ngone.mp4\n")
    (tmp_path / "b.csv").write_text("video\ngone.mp4\nnoise.mp4\n")
    gone, both = (scan(tmp_path / f"{name}.csv") for name in "ab")
    kept = (_record("x.mp4"),)
    with pytest.raises(DataError, match=r"of the clips may be missing, got 1 of 2: gone\.mp4 \(is missing"):
        require_readable(Manifest(root=tmp_path, records=kept, unreadable=gone.unreadable), 0.1)
    with pytest.raises(DataError, match="may be missing or unreadable, got 2 of 3"):
        require_readable(Manifest(root=tmp_path, records=kept, unreadable=both.unreadable), 0.1)
