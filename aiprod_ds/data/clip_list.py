"""The clips of a run in the order in which their indices count, as a small file that stands in every
checkpoint.

A line of JSON a clip, gzipped: part, name, bytes, a mark of its content, and what else of it decides
training. Owns that form and what a mark is; `clip_changes.py` compares two lists. Called at the start of a
run, by `check` and by `inspect`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from typing_extensions import Self

from aiprod_ds import progress
from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.data.latents import LATENTS
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.decode.record import MediaRecord
from aiprod_ds.errors import DataError
from aiprod_ds.files import file_sha256

Fingerprint: TypeAlias = Literal["auto", "content", "time", "size"]
TRAINING, HELD_OUT, BESIDE = 0, 1, 2
FORMAT = 1
_MARK_DIGITS = 32  # 128 bits: two of 1e9 files are alike by chance once in 1e20 runs
_SAMPLE_BYTES = 16 << 10
_MAX_TEXT_BYTES = 8 << 30
# What a clip is called, said twice, or is not trained on.
_NO_FACTS = frozenset(
    {
        "path",
        "sha256",
        "caption",
        "more_captions",
        "audio_path",
        "audio_sha256",
        "audio_peak",
        "audio_clipped",
        "audio_dc",
    }
)
_FACTS_OF_SOUND = frozenset({"audio_rate_hz", "audio_channels", "audio_layout"})
_DEFAULTS = {item.name: item.default for item in fields(MediaRecord)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One clip of a list.

    Attributes:
        part: `TRAINING`, `HELD_OUT`, or `BESIDE` for what is no clip and trained on nevertheless.
        name: Relative to its folder or table.
        num_bytes: Of all its files; None where that is not known.
        mark: Of its content; empty where nothing is known of it but `facts`.
        facts: What decides training beside the content, such as frames as they were probed.
    """

    part: int
    name: str
    num_bytes: int | None = None
    mark: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_line(self) -> str:
        """Returns one line of JSON without its end."""
        values = [self.part, self.name, self.num_bytes, self.mark, self.facts]
        return json.dumps(values, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a list is made of: both manifests of a run, and how marks are taken.

    Attributes:
        train: Its records count as the indices of training do.
        validation: Of the held-out clips.
        by: The setting `data.fingerprint`.
        beside: Files in the folder of `train` that are no clips and are trained on.
    """

    train: Manifest
    validation: Manifest
    by: Fingerprint = "auto"
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipList:
    """A list as a checkpoint holds it.

    Attributes:
        compressed: The file.
        sha256: Of its entries and of what their marks are; the same for the same clips wherever they lie.
        by: What the marks are: `content`, `samples`, `time`, `size` or `facts`. Marks of two kinds cannot be
            compared.
        selection: The settings that chose the clips.
        num_training: Clips that are trained on.
        num_held_out: Clips that are held out.
        left_out: Why files are no clips, by path; known while the folders are at hand, not saved.
    """

    compressed: bytes = field(repr=False)
    sha256: str
    by: str
    selection: Mapping[str, Any]
    num_training: int
    num_held_out: int
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        entries: Iterable[Entry],
        *,
        by: str,
        selection: Mapping[str, Any],
        left_out: Mapping[str, str] | None = None,
    ) -> Self:
        """Returns the list of `entries`, which are taken one by one."""
        header = json.dumps({"format": FORMAT, "by": by, "selection": dict(selection)}, sort_keys=True)
        packer = zlib.compressobj(wbits=31)  # gzip without a time: the same clips are the same bytes
        packed = io.BytesIO(packer.compress(f"{header}\n".encode()))
        packed.seek(0, io.SEEK_END)
        digest, counts = _digest_of(by), [0, 0, 0]
        for entry in entries:
            line = f"{entry.to_line()}\n".encode()
            digest.update(line)
            packed.write(packer.compress(line))
            counts[entry.part] += 1
        packed.write(packer.flush())
        return cls(
            compressed=packed.getvalue(),
            sha256=digest.hexdigest(),
            by=by,
            selection=dict(selection),
            num_training=counts[TRAINING],
            num_held_out=counts[HELD_OUT],
            left_out=left_out or {},
        )

    @classmethod
    def read(cls, compressed: bytes, *, where: str) -> Self:
        """Returns the list in a file.

        Args:
            compressed: All of the file.
            where: How messages name it.

        Raises:
            DataError: If it is damaged or of another format.
        """
        try:
            lines = _lines(compressed)
            header = json.loads(next(lines))
            _require_format(header["format"])
            digest, counts = _digest_of(header["by"]), [0, 0, 0]
            for line in lines:
                digest.update(line)
                counts[json.loads(line)[0]] += 1
            return cls(
                compressed=compressed,
                sha256=digest.hexdigest(),
                by=header["by"],
                selection=dict(header["selection"]),
                num_training=counts[TRAINING],
                num_held_out=counts[HELD_OUT],
            )
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{where}: must be a list of clips of format {FORMAT}, got {error!r}. Take a whole "
                "checkpoint."
            ) from error
        except StopIteration:
            raise DataError(f"{where}: must be a list of clips, got an empty file.") from None

    def entries(self) -> Iterator[Entry]:
        """Yields the clips in order."""
        lines = _lines(self.compressed)
        next(lines)
        for line in lines:
            part, name, num_bytes, mark, facts = json.loads(line)
            yield Entry(part=part, name=name, num_bytes=num_bytes, mark=mark, facts=facts)


def list_files(listing: Listing, *, selection: Mapping[str, Any]) -> ClipList:
    """Returns the list of clips that are files.

    The content of media is known from probing, that of shards from their index, for nothing. That of latents
    in files is not: `auto` reads the beginning, the middle and the end of each, `content` all of it.

    Args:
        listing: The manifests.
        selection: The settings that chose the clips; part of the file, not of the hash.

    Raises:
        DataError: If a file of latents cannot be read.
    """
    parts = ((TRAINING, listing.train), (HELD_OUT, listing.validation))
    is_costly = any(manifest.files and manifest.packed is None for _, manifest in parts)
    by = "samples" if is_costly and listing.by == "auto" else listing.by.replace("auto", "content")

    def entries() -> Iterator[Entry]:
        for part, manifest in parts:
            records = manifest.records
            if manifest.files:
                words = f"comparing the latents of {manifest.where}:"
                yield from (
                    _latents(part, manifest, record, by)
                    for record in progress.steps(records, words, len(records))
                )
            else:
                yield from (_media(part, manifest, record, by) for record in records)
        for name in listing.beside:
            num_bytes, mark = _marked(listing.train, (name,), by)
            yield Entry(part=BESIDE, name=name, num_bytes=num_bytes, mark=mark)

    left_out = {
        item.path: f"{words}: {item.reason}"
        for _, manifest in parts
        for words, items in (("unreadable now", manifest.unreadable), ("ignored now", manifest.ignored))
        for item in items
    }
    return ClipList.of(entries(), by=by, selection=selection, left_out=left_out)


def list_facts(
    train: Sequence[ClipFacts],
    validation: Sequence[ClipFacts],
    *,
    selection: Mapping[str, Any],
    fingerprints: Mapping[str, str] | None = None,
) -> ClipList:
    """Returns the list of clips of which nothing is known but what the plan asks: those of a user's own
    datasets.

    Args:
        train: What `ClipDataset.lengths` returned.
        validation: The same of the held-out clips.
        selection: As of `list_files`.
        fingerprints: What the datasets themselves say of their content, by name.
    """

    def entries() -> Iterator[Entry]:
        for part, clips in ((TRAINING, train), (HELD_OUT, validation)):
            for clip in clips:
                facts = {
                    "frames": clip.frames,
                    "seconds": clip.seconds,
                    "height": clip.height,
                    "width": clip.width,
                }
                yield Entry(part=part, name=clip.name, facts=facts)
        for name, value in (fingerprints or {}).items():
            yield Entry(part=BESIDE, name=name, mark=value)

    return ClipList.of(entries(), by="facts", selection=selection)


def content_mark(manifest: Manifest, clip: str) -> str:
    """Returns a mark of a clip's latents, the same under any name: their sizes and samples of them.

    Raises:
        DataError: If they cannot be read.
    """
    names = [name for name in manifest.files[clip] if name.startswith(f"{LATENTS}/")]
    return "|".join(sorted(f"{_size_and_mark(manifest, name, 'samples')}" for name in names))


def own_fingerprint(dataset: Any) -> str | None:
    """Returns what a user's dataset says of its content by an attribute or a method `fingerprint`, or what
    the dataset of a loader says; None if there is neither."""
    if not hasattr(dataset, "fingerprint"):
        inner = getattr(dataset, "dataset", None)
        return None if inner is None else own_fingerprint(inner)
    found = dataset.fingerprint() if callable(dataset.fingerprint) else dataset.fingerprint
    return None if found is None else str(found)


def _digest_of(by: str) -> hashlib._Hash:
    return hashlib.sha256(f"{by}\n".encode())


def _require_format(found: object) -> None:
    if found != FORMAT:
        raise ValueError(f"format {found!r}")


def _lines(compressed: bytes) -> Iterator[bytes]:
    left = _MAX_TEXT_BYTES
    with gzip.open(io.BytesIO(compressed)) as file:
        while line := file.readline(left + 1):
            left -= len(line)
            if left < 0:
                raise ValueError(f"more than {_MAX_TEXT_BYTES} bytes of text")
            yield line


def _media(part: int, manifest: Manifest, record: MediaRecord, by: str) -> Entry:
    num_bytes, modified = _size_and_time(manifest, record.path)
    mark = {"content": record.sha256[:_MARK_DIGITS], "time": modified}.get(by, "")
    facts = _facts(record, is_sound=manifest.medium == "sound")
    return Entry(part=part, name=record.name, num_bytes=num_bytes, mark=mark, facts=facts)


def _size_and_time(manifest: Manifest, name: str) -> tuple[int | None, str]:
    if manifest.packed is not None:
        return manifest.packed.members[name].size, ""
    try:
        status = os.stat(os.path.join(manifest.root, name))  # noqa: PTH116, PTH118  100,000 of them
    except (OSError, ValueError):
        return None, ""  # gone since it was probed: the loader will tell
    return status.st_size, str(status.st_mtime_ns)


def _latents(part: int, manifest: Manifest, record: MediaRecord, by: str) -> Entry:
    num_bytes, mark = _marked(manifest, manifest.files[record.path], by)
    facts = _facts(record, is_sound=False)
    return Entry(part=part, name=record.path, num_bytes=num_bytes, mark=mark, facts=facts)


def _facts(record: MediaRecord, *, is_sound: bool) -> dict[str, Any]:
    """Returns what decides training; what is as usual is left out, so that a fact that a later version adds
    makes no other list."""
    return {
        name: value
        for name, usual in _DEFAULTS.items()
        if name not in _NO_FACTS
        and (is_sound or name not in _FACTS_OF_SOUND)
        and (value := getattr(record, name)) != usual
    }


def _marked(manifest: Manifest, names: Sequence[str], by: str) -> tuple[int, str]:
    """Returns the bytes of several files and one mark of them."""
    digest, total = hashlib.sha256(), 0
    for name in names:
        num_bytes, said = _size_and_mark(manifest, name, by)
        total += num_bytes
        digest.update(f"{name}|{num_bytes}|{said}\n".encode())
    return total, digest.hexdigest()[:_MARK_DIGITS]


def _size_and_mark(manifest: Manifest, name: str, by: str) -> tuple[int, str]:
    if manifest.packed is not None:
        member = manifest.packed.members[name]
        return member.size, "" if by == "size" else member.sha256  # of no other time than the shard's
    path = manifest.root / name
    try:
        status = path.stat()
        said = {"time": str(status.st_mtime_ns), "size": ""}.get(by)
        if said is None:
            said = file_sha256(path) if by == "content" else _sampled(path, status.st_size)
    except OSError as error:
        raise DataError(f"{path}: must be readable, got {error}. Encode it again.") from error
    return status.st_size, said


def _sampled(path: Path, num_bytes: int) -> str:
    """Returns a hash of the beginning, where a file of tensors says what it holds, the middle and the end."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if num_bytes <= 3 * _SAMPLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for place in (0, (num_bytes - _SAMPLE_BYTES) // 2, num_bytes - _SAMPLE_BYTES):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
