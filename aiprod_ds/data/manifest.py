"""What media there is: a folder or table becomes a `Manifest` of probed, hashed, readable clips. An image is
a clip of one frame; where sound is asked for, a clip is the sound of an audio file or a video.

Owns finding files, reading tables and splitting; `decode/probe.py` looks into files. Called by `check`,
`plan` and the trainers.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiprod_ds import progress
from aiprod_ds.data.captions import MEDIA_COLUMNS, captions_in_row, csv_rows
from aiprod_ds.data.probe_cache import MISSING, Pending, ProbeCache
from aiprod_ds.decode.record import MediaRecord, Medium
from aiprod_ds.errors import DataError
from aiprod_ds.files import files_below, read_text
from aiprod_ds.rng import stream_seed
from aiprod_ds.shards.reader import ShardReader

_MAX_TABLE_BYTES = 4 << 30  # some ten million rows; of a device that never ends no more is read
IMAGE_EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEO_EXTENSIONS = frozenset(
    {
        ".3gp",
        ".apng",
        ".avi",
        ".dv",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    }
)
AUDIO_EXTENSIONS = frozenset(
    {
        ".aac",
        ".ac3",
        ".aif",
        ".aiff",
        ".flac",
        ".m4a",
        ".mka",
        ".mp3",
        ".oga",
        ".ogg",
        ".opus",
        ".wav",
        ".wma",
    }
)
# Pictures and films that are not read, or not rightly: FFmpeg gives the tiles of HEIC and the alpha of AVIF
# as streams of their own.
_FOREIGN_EXTENSIONS = frozenset(
    {
        ".arw",
        ".avif",
        ".braw",
        ".cr2",
        ".cr3",
        ".dng",
        ".exr",
        ".heic",
        ".heif",
        ".jxl",
        ".nef",
        ".psd",
        ".r3d",
    }
)
HIDDEN = "hidden"
"""Why files are ignored whose names begin with a dot."""
PARTIAL_SUFFIXES = frozenset({".crdownload", ".download", ".part", ".partial", ".tmp"})
TABLE_EXTENSIONS = frozenset({".csv", ".json", ".jsonl"})

_EXTENSIONS: Mapping[Medium, frozenset[str]] = {
    "video": IMAGE_EXTENSIONS | VIDEO_EXTENSIONS,
    "sound": AUDIO_EXTENSIONS | VIDEO_EXTENSIONS,
}
# The first of these columns that a row fills names its clip.
_COLUMNS: Mapping[Medium, tuple[str, ...]] = {
    "video": MEDIA_COLUMNS,
    "sound": ("audio", *MEDIA_COLUMNS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A file that cannot be used, and why."""

    path: str
    reason: str

    @property
    def is_missing(self) -> bool:
        """Whether there is no file."""
        return self.reason.startswith(MISSING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The clips under `root`, in a stable order, and the files that were left out.

    Attributes:
        unreadable: Files that should be clips and cannot.
        ignored: Files that are no clips on purpose: hidden ones, and what settings leave out.
        files: By clip, the files under `root` that it consists of, if it is not one of its own name.
        named: Clips whose `sha256` is of their name, because nobody knows of what media they are.
        packed: The shards that hold the files; None where they lie under `root` themselves.
    """

    root: Path
    records: tuple[MediaRecord, ...]
    unreadable: tuple[Unreadable, ...] = ()
    ignored: tuple[Unreadable, ...] = ()
    medium: Medium = "video"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)
    named: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    packed: ShardReader | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """How messages name what holds the clips."""
        return str(self.root) if self.packed is None else self.packed.address

    def file(self, path: str) -> AbstractContextManager[Path]:
        """Returns where the file of a record can be read, inside a `with` block.

        Raises:
            DataError: On entering, if it is packed and cannot be had.
        """
        return nullcontext(self.root / path) if self.packed is None else self.packed.file(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedClip:
    """A clip as a folder or a table lists it, before any file is opened; paths are relative to the folder of
    the list.

    Attributes:
        audio: Of a sound file beside the media; None where the media's own sound counts.
        more_captions: Further ones, only beside `caption`.
    """

    path: str
    audio: str | None = None
    caption: str | None = None
    more_captions: tuple[str, ...] = ()


def scan(source: Path, *, cache: Path | None = None, medium: Medium = "video") -> Manifest:
    """Probes every clip of `source`; a clip that cannot be read is listed in `unreadable`, not raised.

    Args:
        source: A folder, searched recursively and sorted by path, or a CSV, JSON or JSONL table with the
            column `video` or another of `captions.MEDIA_COLUMNS` and optionally `audio` and a caption
            (`captions.CAPTION_COLUMNS`); its paths are relative to the table's folder. For sounds, `audio`
            comes first: a file named there is taken in place of the video's own sound.
        cache: File in which probes are kept between runs (`ProbeCache`); None probes every clip.
        medium: `sound` takes audio files and the sound of videos, and decodes each once to the end.

    Raises:
        DataError: If `source` does not exist or the table is malformed.
    """
    if not source.exists():
        raise DataError(
            f"{source}: must be a folder or a CSV, JSON or JSONL manifest, got nothing there. Correct the "
            "path."
        )
    root = source if source.is_dir() else source.parent
    ignored: list[Unreadable] = []
    is_folder = source.is_dir()
    listed = list(_clips_of_folder(source, medium, ignored)) if is_folder else read_table(source, medium)
    records: list[MediaRecord] = []
    unreadable: list[Unreadable] = []
    with ProbeCache(cache, medium=medium) as probes:
        begun = _begun(root, listed, probes)
        for clip, finish in progress.steps(begun, f"reading the media of {source}:", len(listed)):
            try:
                records.append(finish())
            except DataError as error:
                unreadable.append(Unreadable(path=clip.path, reason=str(error)))
    return Manifest(
        root=root,
        records=tuple(records),
        unreadable=tuple(unreadable),
        ignored=tuple(ignored),
        medium=medium,
    )


def read_table(table: Path, medium: Medium = "video") -> list[ListedClip]:
    """Returns what the rows of a CSV, JSON or JSONL table list, in order; no media is opened.

    Args:
        table: Its columns are those of `scan`.
        medium: For `sound`, `audio` names the clip where a row has it.

    Raises:
        DataError: If the table cannot be read, or a row names no file.
    """
    if table.suffix.lower() not in TABLE_EXTENSIONS:
        raise DataError(
            f"{table}: a manifest must end in .csv, .json or .jsonl, got {table.suffix!r}. Rename or "
            "convert it."
        )
    try:
        rows = list(_rows(table))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{table}: must be a readable {table.suffix[1:]} table, got: {error}. Correct the file."
        ) from error
    return [_listed(table, number, row, medium) for number, row in enumerate(rows, start=1)]


def require_readable(
    manifest: Manifest, max_unreadable_fraction: float, *, setting: str = "data.max_unreadable_fraction"
) -> None:
    """Checks that the manifest holds clips and that few enough files are unreadable.

    Args:
        manifest: From `scan`.
        max_unreadable_fraction: In [0, 1], of all clips that were listed; at 1 still one must be readable.
        setting: What the message advises to raise.

    Raises:
        DataError: If no clip is readable, or the unreadable share is over `max_unreadable_fraction`; names
            the files.
    """
    broken, total = len(manifest.unreadable), len(manifest.unreadable) + len(manifest.records)
    if total == 0:
        raise DataError(
            f"{manifest.where}: must hold at least one {manifest.medium} clip, got none. "
            f"Add files ending in {', '.join(sorted(_EXTENSIONS[manifest.medium]))} or name another folder "
            "or manifest."
        )
    if manifest.records and broken <= max_unreadable_fraction * total:
        return
    named = "; ".join(f"{item.path} ({item.reason})" for item in manifest.unreadable[:5])
    more = f"; and {broken - 5} more" if broken > 5 else ""
    missing = sum(item.is_missing for item in manifest.unreadable)
    kind = "unreadable" if missing == 0 else "missing" if missing == broken else "missing or unreadable"
    rule = (
        f"at most {max_unreadable_fraction:.0%} of the clips may be {kind}"
        if manifest.records
        else "no clip is readable"
    )
    raise DataError(
        f"{manifest.where}: {rule}, got {broken} of {total}: {named}{more}. {_remedy(kind)}, or "
        f"raise {setting}."
    )


def _remedy(kind: str) -> str:
    return {
        "unreadable": "Repair or remove these files",
        "missing": "Correct these paths or remove their rows",
    }.get(kind, "Correct the paths of what is missing, repair or remove the others")


def holdout(manifest: Manifest, *, fraction: float, seed: int) -> tuple[Manifest, Manifest]:
    """Splits into (train, validation) by content: byte-identical files never stand on both sides.

    `round(fraction * clips)` clips are held out, at least one and never all; copies of one file may make it
    more. The choice depends on `seed` and the content, not on names or order. Among images and videos only
    videos count and are held out, because an image cannot be measured in a video's shape; images alone are
    split like videos. Unreadable files stay with train.

    Raises:
        DataError: If there are fewer than two different clips.
    """
    candidates = _videos_or_all(manifest.records)
    contents = sorted(
        {record.sha256 for record in candidates}, key=lambda sha: (stream_seed(seed, "holdout", sha), sha)
    )
    if len(contents) < 2:
        raise DataError(
            f"{manifest.where}: holding out validation clips needs at least 2 different clips, got "
            f"{len(contents)}. "
            "Add clips or set data.validation."
        )
    wanted = max(1, round(fraction * len(candidates)))
    copies = Counter(record.sha256 for record in candidates)
    held: set[str] = set()
    count = 0
    for sha in contents[:-1]:
        if count >= wanted:
            break
        held.add(sha)
        count += copies[sha]
    train = tuple(record for record in manifest.records if record.sha256 not in held)
    validation = tuple(record for record in manifest.records if record.sha256 in held)
    return (
        replace(manifest, records=train),
        replace(manifest, records=validation, unreadable=(), ignored=()),
    )


def _videos_or_all(records: tuple[MediaRecord, ...]) -> tuple[MediaRecord, ...]:
    videos = tuple(record for record in records if record.frames > 1)
    return videos if len({record.sha256 for record in videos}) > 1 else records


def _clips_of_folder(folder: Path, medium: Medium, ignored: list[Unreadable]) -> Iterator[ListedClip]:
    """Yields the clips by path; media that are none on purpose, and what cannot be listed, are added to
    `ignored`."""

    def note(path: str, error: OSError) -> None:
        ignored.append(Unreadable(path=path or ".", reason=f"cannot be listed ({error.strerror})"))

    for path in files_below(folder, on_error=note):
        reason = why_no_clip(path, medium)
        if reason is None:
            continue
        if reason:
            ignored.append(Unreadable(path=path, reason=reason))
        else:
            yield ListedClip(path=path)


def why_no_clip(path: str, medium: Medium) -> str | None:
    """Returns why a file with a medium's name is no clip, empty if it is one; None for other files.

    Args:
        path: From the folder that is searched.
        medium: What is searched for.
    """
    stem, _, ending = path.rpartition(".")  # of many files: a path object takes longer than all the rest
    suffix = f".{ending.lower()}"
    if suffix in _EXTENSIONS[medium]:
        reason = ""
    elif suffix in PARTIAL_SUFFIXES and f".{stem.rpartition('.')[2].lower()}" in _EXTENSIONS[medium]:
        reason = "not whole yet"
    elif suffix in _FOREIGN_EXTENSIONS and medium == "video":
        reason = "of a kind that is not read, convert it"
    else:
        return None
    # `._clip.mp4` is what macOS leaves on foreign disks; it has a film's name and no film in it.
    return HIDDEN if path.startswith(".") or "/." in path else reason


def _rows(table: Path) -> Iterable[Any]:
    text = read_text(table, limit=_MAX_TABLE_BYTES).removeprefix("\ufeff")
    if table.suffix.lower() == ".csv":
        return csv_rows(text)
    if table.suffix.lower() == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(f"a {type(rows).__name__} instead of a list of rows")  # noqa: TRY004  # malformed text, not a wrong call
    return rows


def _listed(table: Path, number: int, row: Any, medium: Medium) -> ListedClip:
    columns = row if isinstance(row, dict) else {}
    path = next((columns[name] for name in _COLUMNS[medium] if columns.get(name)), None)
    if not isinstance(path, str):
        names = " or ".join(repr(name) for name in _COLUMNS[medium])
        raise DataError(
            f"{table}: row {number}: must name a file in column {names}, got {row!r}. Add it or drop the row."
        )
    if not isinstance(columns.get("audio") or "", str):
        raise DataError(
            f"{table}: row {number}: audio must be text, got {str(columns['audio'])[:80]!r}. Correct it."
        )
    try:
        captions = captions_in_row(columns)
    except ValueError as error:
        raise DataError(f"{table}: row {number}: {error}. Correct it.") from error
    audio = columns.get("audio") or None if medium == "video" else None
    first = captions[0] if captions else None
    return ListedClip(path=path, audio=audio, caption=first, more_captions=captions[1:])


def _begun(
    root: Path, clips: Iterable[ListedClip], probes: ProbeCache
) -> Iterator[tuple[ListedClip, Callable[[], MediaRecord]]]:
    """Yields each clip with what waits for its record; some that follow have then begun, too."""
    waiting: deque[tuple[ListedClip, Callable[[], MediaRecord]]] = deque()
    for clip in clips:
        waiting.append((clip, _begin(root, clip, probes)))
        if len(waiting) > probes.window:
            yield waiting.popleft()
    yield from waiting


def _begin(root: Path, clip: ListedClip, probes: ProbeCache) -> Callable[[], MediaRecord]:
    file = probes.begin(root / clip.path)
    audio = None if clip.audio is None else probes.begin(root / clip.audio, is_sound=True)
    return lambda: _record(clip, file, audio)


def _record(clip: ListedClip, file: Pending, audio: Pending | None) -> MediaRecord:
    record = replace(
        file().record,
        path=clip.path,
        caption=clip.caption,
        more_captions=clip.more_captions,
    )
    if audio is None:
        return record
    try:
        sound = audio().record
    except DataError as error:
        raise DataError(f"its audio file {clip.audio} {error}") from error
    return replace(
        record,
        audio_path=clip.audio,
        audio_sha256=sound.sha256,
        audio_rate_hz=sound.audio_rate_hz,
        audio_channels=sound.audio_channels,
        audio_layout=sound.audio_layout,
        audio_peak=sound.audio_peak,
        audio_clipped=sound.audio_clipped,
        audio_dc=sound.audio_dc,
    )
