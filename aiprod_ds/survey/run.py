"""The survey: every file is looked into once, its row kept on the disk, and told of when all are known.

Two passes, because some things are known only at the end: what stands twice, whether captions are in use, and
the shapes that fit all clips.
Neither keeps rows in memory. Owns the passes; the rules are `findings.py`'s and `shapes.py`'s. Called by the
command line.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aiprod_ds import progress
from aiprod_ds.data.captions import CaptionFinder
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.data.probe_cache import Pending, ProbeCache, default_probe_cache
from aiprod_ds.decode.record import Medium, Probed
from aiprod_ds.errors import DataError
from aiprod_ds.survey.demands import Demands
from aiprod_ds.survey.findings import Finding, Level, of_record, of_unreadable
from aiprod_ds.survey.listing import CAPTION, TEXT, Entry, entries_of
from aiprod_ds.survey.rows import Row, row_of
from aiprod_ds.survey.shapes import ShapeFinder, is_placed, placement
from aiprod_ds.survey.sheet import Tile, tiles_of
from aiprod_ds.survey.tally import Tally

_MAX_CAPTION = 200
_CAPTIONS_IN_USE = 0.1  # of the files; fewer have one by chance, or from another use
_NO_VIDEO = "holds no video stream"
_HASH_DIGITS = 16


class Writer(Protocol):
    """Takes what the survey tells of, row by row."""

    def row(self, row: Row) -> None:
        """Takes a file that was looked into."""

    def ignored(self, path: str, reason: str) -> None:
        """Takes a file that was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What is told of a folder or table as a whole.

    Attributes:
        tiles: Middle frames of some clips, evenly chosen.
        num_copies: Files of the same content as one before them.
    """

    source: Path
    root: Path
    demands: Demands
    tally: Tally
    tiles: tuple[Tile, ...] = ()
    num_copies: int = 0


def survey(
    source: Path,
    demands: Demands,
    *,
    spool: IO[str],
    writers: tuple[Writer, ...] = (),
    num_tiles: int = 0,
) -> Survey:
    """Looks into everything and tells the writers of it; what cannot be read is told of, not raised.

    Args:
        source: A folder or a table.
        demands: What is asked of the files.
        spool: An empty text file, open for writing and reading, in which rows wait.
        writers: What rows are given to, in the order of the list.
        num_tiles: Pictures of the contact sheet at most.

    Raises:
        DataError: If there is nothing at `source`, or the table is malformed.
    """
    if not source.exists():
        raise DataError(
            f"{source}: must be a folder or a CSV, JSON or JSONL table, got nothing there. Correct the path."
        )
    root = source if source.is_dir() else source.parent
    first = _FirstPass(root=root, demands=demands, shapes=ShapeFinder(demands))
    with ExitStack() as stack:
        first.open(source, stack)
        title = f"reading the media of {source}:"
        with progress.counting(title, _num_media(source, demands)) as told:
            for line in first.lines(entries_of(source, demands.wanted), told.advance):
                spool.write(line)
    spool.flush()
    tiles = tiles_of(_some_pictures(spool, first.num_pictures, num_tiles), root, demands)
    tally = Tally()
    num_copies = _tell(spool, first, {tile.path: tile.problem for tile in tiles}, tally, writers)
    return Survey(
        source=source, root=root, demands=demands, tally=tally, tiles=tuple(tiles), num_copies=num_copies
    )


def _num_media(source: Path, demands: Demands) -> int:
    listed = entries_of(source, demands.wanted)
    return sum(entry.medium is not None for entry in progress.steps(listed, f"listing {source}:"))


@dataclass(slots=True, kw_only=True)
class _FirstPass:
    """What is counted while files are looked into."""

    root: Path
    demands: Demands
    num_pictures: int = 0
    num_used: int = 0
    num_captioned: int = 0
    shapes: ShapeFinder
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    captioned: array[int] = field(default_factory=lambda: array("Q"))
    _probes: dict[Medium, ProbeCache] = field(default_factory=dict)
    _captions: CaptionFinder | None = None

    def open(self, source: Path, stack: ExitStack) -> None:
        """Opens the caches, which are those of training."""
        for medium in ("video", "sound"):
            cache = default_probe_cache(source, medium=medium)
            # Training asks the same files for pictures, and more for sounds: it decides what is forgotten.
            probes = ProbeCache(cache, medium=medium, forgets=False)
            self._probes[medium] = stack.enter_context(probes)
        self._captions = CaptionFinder(self.root, a_line_each=self.demands.captions_per_line)

    def lines(self, entries: Iterator[Entry], advance: Callable[[], None]) -> Iterator[str]:
        """Yields what the spool holds of each file."""
        waiting: deque[tuple[Entry, Callable[[], Row] | None]] = deque()
        window = self._probes["video"].window
        for entry in entries:
            waiting.append((entry, None if entry.medium is None else self._begin(entry)))
            if len(waiting) > window:
                yield self._line(*waiting.popleft(), advance)
        while waiting:
            yield self._line(*waiting.popleft(), advance)

    def _line(self, entry: Entry, finish: Callable[[], Row] | None, advance: Callable[[], None]) -> str:
        if finish is None:
            return "i" + json.dumps([entry.path, entry.reason]) + "\n"
        row = finish()
        advance()
        self.num_used += row.is_used
        if row.captions:
            self.num_captioned += row.is_used
            self.captioned.append(_hash(PurePath(row.path).with_suffix("").as_posix()))
        if row.sha256:
            self.hashes.append(int(row.sha256[:_HASH_DIGITS], 16))
        self.shapes.add(row)
        is_picture = row.is_used and row.height > 0
        self.num_pictures += is_picture
        return ("p" if is_picture else "f") + json.dumps(row.to_dict()) + "\n"

    def _begin(self, entry: Entry) -> Callable[[], Row]:
        assert entry.medium is not None, "of a file that is looked into"
        file = self._probes[entry.medium].begin(self.root / entry.path)
        audio = (
            None
            if entry.audio is None
            else self._probes["video"].begin(self.root / entry.audio, is_sound=True)
        )
        return lambda: self._row(entry, file, audio)

    def _row(self, entry: Entry, file: Pending, audio: Pending | None) -> Row:
        try:
            probed = self._probed(entry, file)
        except DataError as error:
            return Row(
                path=entry.path,
                num_bytes=_size(self.root / entry.path),
                findings=(of_unreadable(str(error)),),
            )
        sound: Probed | None = None
        try:
            sound = None if audio is None else audio()
        except DataError as error:
            found = Finding(kind="unusable_sound", text=f"its audio file {entry.audio} {error}")
            return replace(row_of(entry.path, probed, None), findings=(found,))
        return self._judged(entry, probed, sound)

    def _probed(self, entry: Entry, file: Pending) -> Probed:
        try:
            return file()
        except DataError as error:
            # A film's name, and sound alone in it: where nobody has said what is wanted, it is a sound.
            if str(error) != _NO_VIDEO or self.demands.wanted != "any":
                raise
            return self._probes["sound"].begin(self.root / entry.path)()

    def _judged(self, entry: Entry, probed: Probed, sound: Probed | None) -> Row:
        record = probed.record
        row = row_of(entry.path, probed, sound)
        findings = list(of_record(row, record, record if sound is None else sound.record, self.demands))
        captions, problem = self._captions_of(entry)
        if problem is not None:
            findings.append(problem)
        if self.demands.sounds is not None and (unusable := _unusable_sound(probed, self.demands)):
            findings.append(unusable)
        return replace(
            row,
            audio_path=entry.audio or "",
            captions=len(captions),
            caption=captions[0][:_MAX_CAPTION] if captions else "",
            findings=tuple(findings),
        )

    def _captions_of(self, entry: Entry) -> tuple[tuple[str, ...], Finding | None]:
        assert self._captions is not None, "see open"
        if entry.captions:
            return entry.captions, None
        try:
            return self._captions(entry.path), None
        except DataError as error:
            return (), Finding(kind="caption_problem", text=str(error))


def _unusable_sound(probed: Probed, demands: Demands) -> Finding | None:
    from aiprod_ds.data.audio_dataset import usable_sounds  # loads torch, which takes seconds

    assert demands.sounds is not None, "see the caller"
    found = usable_sounds(Manifest(root=Path(), records=(probed.record,), medium="sound"), demands.sounds)
    return Finding(kind="unusable_sound", text=found.unreadable[0].reason) if found.unreadable else None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return 0


def _some_pictures(spool: IO[str], count: int, most: int) -> Iterator[Row]:
    """Yields rows of pictures and films at even distances through the list."""
    chosen = set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()) if count else set()
    number = 0
    spool.seek(0)
    for line in spool:
        if line[0] == "p":
            if number in chosen:
                yield Row.from_dict(json.loads(line[1:]))
            number += 1


def _tell(
    spool: IO[str], first: _FirstPass, damaged: dict[str, str], tally: Tally, writers: tuple[Writer, ...]
) -> int:
    """Gives every row to the tally and the writers, with what is known only now; returns the number of
    copies."""
    hashes, counts = np.unique(np.frombuffer(first.hashes, dtype=np.uint64), return_counts=True)
    repeated = set(hashes[counts > 1].tolist())
    captioned = np.unique(np.frombuffer(first.captioned, dtype=np.uint64))
    originals: dict[str, str] = {}
    phases = first.shapes.phases()
    num_copies = 0
    spool.seek(0)
    for line in spool:
        if line[0] == "i":
            path, reason = json.loads(line[1:])
            reason = CAPTION if reason == TEXT and _is_caption(path, captioned) else reason
            tally.ignore(path, reason)
            for writer in writers:
                writer.ignored(path, reason)
            continue
        row = Row.from_dict(json.loads(line[1:]))
        more: list[Finding] = []
        known: dict[str, Any] = {}
        if row.sha256 and int(row.sha256[:_HASH_DIGITS], 16) in repeated:
            original = originals.setdefault(row.sha256, row.path)
            if original != row.path:
                num_copies += 1
                known["duplicate_of"] = original
                more.append(Finding(kind="duplicate", text=f"same content as {original}"))
        if damaged.get(row.path):
            more.append(Finding(kind="damaged", text=damaged[row.path]))
        more += _about_captions(row, first)
        if is_placed(row, first.demands):
            placed = placement(row, first.demands, phases)
            known["buckets"] = placed.buckets
            more += placed.findings
        row = replace(row, **known, findings=tuple(sorted((*row.findings, *more), key=_by_level)))
        tally.add(row)
        for writer in writers:
            writer.row(row)
    return num_copies


def _is_caption(path: str, captioned: NDArray[np.uint64]) -> bool:
    """Returns whether a clip with captions has the name of a text file, or that without a last suffix."""
    name = PurePath(path).with_suffix("")
    for stem in (name, name.with_suffix("")):
        number = np.uint64(_hash(stem.as_posix()))
        at = int(captioned.searchsorted(number))
        if at < len(captioned) and captioned[at] == number:
            return True
    return False


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _about_captions(row: Row, first: _FirstPass) -> Iterator[Finding]:
    needs = first.demands.needs_captions
    if row.captions or not row.is_used or needs is False:
        return
    if needs:
        yield Finding(kind="no_caption_left_out", text="no caption")
    elif first.num_captioned >= _CAPTIONS_IN_USE * first.num_used and first.num_captioned:
        yield Finding(kind="no_caption", text="no caption")


def _by_level(found: Finding) -> Level:
    return found.level
