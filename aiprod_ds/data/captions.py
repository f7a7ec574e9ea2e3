"""The captions of media as people keep them: in a table's row, in a text file beside the media, or in a table
that lies in the folder.

All rules are here; other rooms ask, and nothing else reads captions. `captions_in_row` is what a table's row
says. `CaptionFinder(root)("clips/a.mp4")` is what files say, by the first of these that has any text:

1. `a.txt`, `a.caption` beside `a.mp4`, or `a.mp4.txt`: the whole file is one caption, or with
   `a_line_each` every line that is not empty is one.
2. `captions.json` in the same folder: `{"a.mp4": "text"}` or `{"a.mp4": ["text", "other text"]}`.
3. `metadata.jsonl` or `metadata.csv` in the same folder or one above it, up to the root: the row whose
   `file_name` (or another column of `MEDIA_COLUMNS`) is the path from that folder.

`with_captions` does both for a manifest: a row's own caption comes first. A clip may have several captions;
the first is the one where only one is asked for. Text is UTF-8, that of files stripped at its ends; empty
text is none.
Called by `manifest.py`, by `aiprod_ds.encode` and by the survey of a folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from aiprod_ds.errors import DataError
from aiprod_ds.files import read_text

if TYPE_CHECKING:
    from aiprod_ds.data.manifest import Manifest

CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
"""The first that a row fills counts: ltx-trainer has `caption`, Hugging Face `text`, DiffSynth `prompt`."""
MEDIA_COLUMNS = ("video", "media_path", "video_path", "image", "image_path", "file_name", "file_path", "path")
"""The first that a row fills names its clip."""
_OF_ALL = "captions.json"
_TABLES = ("metadata.jsonl", "metadata.csv")
_MAX_TEXT_BYTES = 1 << 20
_MAX_TABLE_BYTES = 4 << 30


def captions_in_row(row: Mapping[Any, Any]) -> tuple[str, ...]:
    """Returns the captions of a table's row; none if no column has any.

    Raises:
        ValueError: As `<column> must be ..., got ...`, if they are neither text nor a list of texts.
    """
    name = next((name for name in CAPTION_COLUMNS if row.get(name)), None)
    return () if name is None else _texts(row[name], name)


def csv_rows(text: str) -> Iterator[dict[str, str | None]]:
    """Yields the rows of a CSV table by column; cells that a row lacks are None.

    Raises:
        ValueError: If a column stands twice, a row has more cells than the header, as of a caption with a
            comma and no quotes, or quotes are not closed. Each would train on another text than was written.
    """
    # Not splitlines: it also cuts at characters that a caption may hold, such as U+2028.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} twice")
        for cells in reader:
            if len(cells) > len(header):
                raise ValueError(
                    f"line {reader.line_num}: {len(cells)} cells under {len(header)} columns; quote cells "
                    f"that hold commas, right behind the comma before them: {','.join(cells)!r:.160}"
                )
            if cells:
                yield {name: cells[i] if i < len(cells) else None for i, name in enumerate(header)}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}, look for quotes that are not closed") from error


class CaptionFinder:
    """Finds the captions that files hold; tables are read once a folder.

    Args:
        root: What paths are relative to; tables above it are not looked for.
        a_line_each: Whether each line of a text file is a caption of its own.
    """

    def __init__(self, root: Path, *, a_line_each: bool = False) -> None:
        self._root = root
        self._a_line_each = a_line_each
        self._tables: dict[Path, Mapping[str, tuple[str, ...]]] = {}

    def __call__(self, path: str) -> tuple[str, ...]:
        """Returns the captions of the media file at `path`; none if there are none.

        Raises:
            DataError: If a file that should hold them cannot be read; names it.
        """
        media = PurePosixPath(path)
        found = self._beside(media)
        return found or self._in_tables(media)

    def _beside(self, media: PurePosixPath) -> tuple[str, ...]:
        names = [media.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        for name in (*names, media.with_name(f"{media.name}.txt")):
            file = self._root / name
            if file != self._root / media and file.is_file():
                text = _text(file, _MAX_TEXT_BYTES)
                captions = _stripped(text.split("\n") if self._a_line_each else [text])
                if captions:
                    return captions
        return ()

    def _in_tables(self, media: PurePosixPath) -> tuple[str, ...]:
        for folder in media.parents:
            if folder.is_absolute() or ".." in folder.parts:
                return ()
            found = self._table(self._root / folder).get(media.relative_to(folder).as_posix(), ())
            if found:
                return found
        return ()

    def _table(self, folder: Path) -> Mapping[str, tuple[str, ...]]:
        if folder not in self._tables:
            known: dict[str, tuple[str, ...]] = {}
            for name in (_OF_ALL, *_TABLES):
                if (folder / name).is_file():
                    for path, captions in _rows(folder / name):
                        known.setdefault(path, captions)
            self._tables[folder] = known
        return self._tables[folder]


def with_captions(manifest: Manifest, *, a_line_each: bool = False) -> tuple[Manifest, dict[str, str]]:
    """Returns the manifest with the captions that files hold for clips without one in their row, and what is
    wrong with files of captions, by clip.

    Args:
        manifest: From `aiprod_ds.data.manifest.scan`.
        a_line_each: As for `CaptionFinder`.
    """
    finder = CaptionFinder(manifest.root, a_line_each=a_line_each)
    problems: dict[str, str] = {}
    records = []
    for record in manifest.records:
        captions = record.captions
        if not captions:
            try:
                captions = finder(record.path)
            except DataError as error:
                problems[record.path] = str(error)
        first = captions[0] if captions else None
        records.append(replace(record, caption=first, more_captions=captions[1:]))
    return replace(manifest, records=tuple(records)), problems


def with_trigger(captions: tuple[str, ...], trigger: str | None) -> tuple[str, ...]:
    """Returns the captions with the trigger word and a space before each; example: `sks, a dog runs`."""
    if trigger is None:
        return captions
    return tuple(f"{trigger} {caption}".strip() for caption in captions)


def _texts(value: object, name: str) -> tuple[str, ...]:
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be text or a list of texts, got {value!r:.80}")
    return tuple(text for text in texts if text.strip())


def _stripped(texts: list[str]) -> tuple[str, ...]:
    return tuple(text for text in (each.strip() for each in texts) if text)


def _text(file: Path, limit: int) -> str:
    try:
        return read_text(file, limit=limit).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: must be a readable text file, got: {error}. Correct it.") from error


def _rows(table: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields path and captions of every row that has both."""
    text = _text(table, _MAX_TABLE_BYTES)
    try:
        if table.name == _OF_ALL:
            yield from ((path, _texts(value, path)) for path, value in dict(json.loads(text)).items())
            return
        rows = (
            csv_rows(text)
            if table.suffix == ".csv"
            else (json.loads(line) for line in text.split("\n") if line.strip())
        )
        for row in rows:
            path = next((row[name] for name in MEDIA_COLUMNS if row.get(name)), None)
            captions = captions_in_row(row)
            if isinstance(path, str) and captions:
                yield PurePosixPath(path).as_posix(), captions
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{table}: must be a table of captions, got: {error}. Correct the file.") from error
