"""Every file of a folder, or every row of a table, told apart by name: what is looked into and what is not,
with the reason.

Owns the reasons; which names are media is `aiprod_ds.data.manifest`'s. Called by `run.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from aiprod_ds.data.captions import CAPTION_SUFFIXES
from aiprod_ds.data.manifest import (
    AUDIO_EXTENSIONS,
    HIDDEN,
    PARTIAL_SUFFIXES,
    TABLE_EXTENSIONS,
    read_table,
    why_no_clip,
)
from aiprod_ds.files import files_below
from aiprod_ds.survey.demands import Wanted

NOT_WHOLE = "not whole yet"
TEXT = "text without a clip"
CAPTION = "caption of a clip"
TABLE = "table"
NO_MEDIA = "no media by name"
_NOT_WANTED = {
    "video": "a sound, which this configuration does not take",
    "sound": "a picture, which this configuration does not take",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file, by its path from the folder of the list.

    Attributes:
        medium: What of it counts; None if it is not looked into.
        reason: Why it is not.
        audio: A sound file beside it, of a table.
        captions: Of a table.
    """

    path: str
    medium: Literal["video", "sound"] | None = None
    reason: str = ""
    audio: str | None = None
    captions: tuple[str, ...] = ()


def entries_of(source: Path, wanted: Wanted) -> Iterator[Entry]:
    """Yields every file of a folder in the order of its path, or every row of a table in its own.

    Raises:
        DataError: If the table is malformed.
    """
    if source.is_dir():
        yield from _of_folder(source, wanted)
        return
    for clip in read_table(source, "sound" if wanted == "sound" else "video"):
        captions = () if clip.caption is None else (clip.caption, *clip.more_captions)
        is_sound = wanted == "sound" or (
            wanted == "any" and PurePath(clip.path).suffix.lower() in AUDIO_EXTENSIONS
        )
        yield Entry(
            path=clip.path, medium="sound" if is_sound else "video", audio=clip.audio, captions=captions
        )


def _of_folder(folder: Path, wanted: Wanted) -> Iterator[Entry]:
    unlisted: list[Entry] = []

    def note(path: str, error: OSError) -> None:
        unlisted.append(Entry(path=path or ".", reason=f"a folder that cannot be listed: {error.strerror}"))

    for path in files_below(folder, on_error=note):
        yield from unlisted
        unlisted.clear()
        yield _entry(path, wanted)
    yield from unlisted


def _entry(path: str, wanted: Wanted) -> Entry:
    reasons = {"video": why_no_clip(path, "video"), "sound": why_no_clip(path, "sound")}
    if wanted != "sound" and reasons["video"] == "":
        return Entry(path=path, medium="video")
    if wanted != "video" and reasons["sound"] == "":
        return Entry(path=path, medium="sound")
    reason = reasons["video"] or reasons["sound"]
    if reason:
        return Entry(path=path, reason=reason)
    if "" in reasons.values():
        return Entry(path=path, reason=_NOT_WANTED[wanted])
    return Entry(path=path, reason=_why_no_media(path))


def _why_no_media(path: str) -> str:
    if path.startswith(".") or "/." in path:
        return HIDDEN
    suffix = PurePath(path).suffix.lower()
    if suffix in PARTIAL_SUFFIXES:
        return NOT_WHOLE
    if suffix in CAPTION_SUFFIXES:
        return TEXT
    return TABLE if suffix in TABLE_EXTENSIONS else NO_MEDIA
