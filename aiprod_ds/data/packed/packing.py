"""Turns a folder or a table of latents or of media into shards, and makes the index of shards anew.

Owns which files belong together and what the index says of each. Called by `aiprod-ds shard` and by `encode`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save

from aiprod_ds import progress
from aiprod_ds.data.captions import with_captions
from aiprod_ds.data.latent_index import latent_names, latents_root
from aiprod_ds.data.latents import (
    AUDIO_LATENTS,
    CONDITIONS,
    EMPTY_PROMPT,
    FOREIGN_SUFFIX,
    FOUND_BUCKETS,
    LATENTS,
    SUFFIX,
    find_beside,
    find_entry,
    read_entry,
    read_header,
    require_inside,
    split_name,
)
from aiprod_ds.data.manifest import Manifest, Unreadable, read_table, require_readable, scan
from aiprod_ds.data.packed.media import KINDS, facts_of_record
from aiprod_ds.data.probe_cache import default_probe_cache
from aiprod_ds.decode.record import MediaRecord, Medium
from aiprod_ds.errors import DataError
from aiprod_ds.files import file_sha256
from aiprod_ds.shards.index import ShardIndex, read_index
from aiprod_ds.shards.storage import INDEX, Storage
from aiprod_ds.shards.writer import PackedFile, index_shards, write_shards

RECORD_SUFFIX = ".record.json"
"""Before every packed clip: what the index says of it, so that the index can be made anew without
decoding."""


def pack_latents(
    source: Path,
    storage: Storage,
    *,
    shard_bytes: int,
    root: Path | None = None,
    skip_missing: bool = False,
) -> ShardIndex:
    """Packs the latents, sounds and embeddings of every clip, and the empty caption; returns the index.

    Entries of one clip lie together, so that one request reads them. ltx-trainer's files are packed as
    safetensors with the same tensors and numbers. Shards that hold the very same files already are left as
    they are.

    Args:
        source: As `scan_latents` takes it; of a table, its rows' clips.
        storage: Where the shards go; holds nothing else.
        shard_bytes: What a shard holds at most.
        root: Where the latents are; None finds them as `scan_latents` does.
        skip_missing: Whether rows of a table without latents are left out.

    Raises:
        DataError: If there are no latents, or a file cannot be read or written.
    """
    root = latents_root(source) if root is None else root
    names: dict[str, list[str]] = {}
    for name in latent_names(root):
        names.setdefault(split_name(name)[0], []).append(name)
    clips = list(names) if source.is_dir() else _clips_of_rows(source, names, skip_missing=skip_missing)
    if not clips:
        raise DataError(f"{source}: must have latents to pack, got none. Run `aiprod-ds encode` first.")

    def groups() -> Iterator[list[PackedFile]]:
        for name in (EMPTY_PROMPT, FOUND_BUCKETS):
            beside = find_beside(root, name)
            if isinstance(beside, Path):
                yield [_packed_entry(beside, name)]
        for clip in progress.steps(clips, f"packing the latents of {root}:", len(clips)):
            yield list(_entries_of(root, clip, names[clip]))

    present = _present(storage)
    if present is not None and present.kind == LATENTS and _holds(present, chain.from_iterable(groups())):
        return present
    return write_shards(groups(), storage, kind=LATENTS, shard_bytes=shard_bytes)


def holds_latents(source: Path) -> bool:
    """Returns whether a folder holds latents itself; a folder or a table of media whose latents lie elsewhere
    does not."""
    return (source / LATENTS).is_dir()


def pack_media(
    source: Path, storage: Storage, *, medium: Medium, shard_bytes: int
) -> tuple[ShardIndex, tuple[Unreadable, ...]]:
    """Packs clips with what is known of them, captions and sounds of their own included; returns the index
    and what is left out because it cannot be read.

    Args:
        source: A folder or a table, as `scan` takes it.
        storage: Where the shards go; holds nothing yet.
        medium: What counts of the files: `sound` for training of audio VAEs.
        shard_bytes: What a shard holds at most.

    Raises:
        DataError: If no clip can be read, or a path leads out of the folder.
    """
    found = scan(source, cache=default_probe_cache(source, medium=medium), medium=medium)
    require_readable(found, 1.0)
    manifest, problems = with_captions(found)
    if problems:
        raise DataError("; ".join(problems.values()))
    records: dict[str, MediaRecord] = {}
    for record in manifest.records:
        _require_inside(source, record.path)
        records.setdefault(record.path, record)

    def groups() -> Iterator[list[PackedFile]]:
        taken = set(records)
        for record in progress.steps(records.values(), f"packing the media of {source}:", len(records)):
            yield list(_files_of(manifest, record, taken))

    index = write_shards(groups(), storage, kind=KINDS[medium], shard_bytes=shard_bytes)
    return index, manifest.unreadable


def make_index(storage: Storage) -> ShardIndex:
    """Makes the index of shards that `pack_latents` or `pack_media` wrote; reads them as a whole.

    Raises:
        DataError: If there are no shards, or what is in them was not packed here.
    """
    records: dict[str, Any] = {}

    def facts_of(name: str, file: Path) -> object:
        if name.endswith(RECORD_SUFFIX):
            records[name.removesuffix(RECORD_SUFFIX)] = json.loads(file.read_text(encoding="utf-8"))
        elif name.endswith(SUFFIX):
            return read_header(file).to_facts()
        # The record of a clip lies before the clip.
        return records.get(name, {}).get("record")

    def kind_of(names: Sequence[str]) -> str:
        kinds = {record["kind"] for record in records.values()}
        if any(name.startswith(f"{LATENTS}/") for name in names):
            kinds.add(LATENTS)
        if len(kinds) != 1:
            raise DataError(
                f"{storage.address}: must be shards that `aiprod-ds shard` made, got "
                f"{sorted(kinds) or 'others'}."
            )
        return str(kinds.pop())

    return index_shards(storage, kind_of=kind_of, facts_of=facts_of)


def _present(storage: Storage) -> ShardIndex | None:
    """Returns the index of shards that are there already; None if there are none."""
    return read_index(storage) if INDEX in (storage.sizes() or ()) else None


def _holds(index: ShardIndex, files: Iterable[PackedFile]) -> bool:
    """Returns whether shards hold these files and no others."""
    count = 0
    for file in files:
        member = index.members.get(file.name)
        content = file.content
        found = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        if member is None or member.sha256 != found:
            return False
        count += 1
    return count == len(index.members)


def _clips_of_rows(table: Path, names: dict[str, list[str]], *, skip_missing: bool) -> list[str]:
    rows = dict.fromkeys(listed.path for listed in read_table(table))
    # ltx-trainer leaves the suffix of the media out
    known = {row: row if row in names else str(Path(row).with_suffix("")) for row in rows}
    missing = [row for row, clip in known.items() if clip not in names]
    if missing and not skip_missing:
        raise DataError(
            f"{table}: every row must have latents to be packed, got none for {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}. Encode the table first."
        )
    return [clip for clip in known.values() if clip in names]


def _entries_of(root: Path, clip: str, names: Sequence[str]) -> Iterator[PackedFile]:
    wanted = [(CONDITIONS, clip)]
    wanted += [(source, name) for name in names for source in (LATENTS, AUDIO_LATENTS)]
    for source, name in wanted:
        path = find_entry(root, source, name)
        if isinstance(path, Path):
            yield _packed_entry(path, f"{source}/{name}{SUFFIX}")


def _packed_entry(path: Path, name: str) -> PackedFile:
    header = read_header(path)
    content: bytes | Path = path
    if path.suffix == FOREIGN_SUFFIX:
        tensors = {key: tensor.contiguous() for key, tensor in read_entry(path).items()}
        content = save(tensors, metadata=dict(header.metadata))
    return PackedFile(name=name, content=content, facts=header.to_facts())


def _files_of(manifest: Manifest, record: MediaRecord, taken: set[str]) -> Iterator[PackedFile]:
    facts = facts_of_record(record)
    text = json.dumps({"kind": KINDS[manifest.medium], "record": facts}, ensure_ascii=False, indent=1)
    yield PackedFile(name=f"{record.path}{RECORD_SUFFIX}", content=text.encode())
    yield PackedFile(name=record.path, content=manifest.root / record.path, facts=facts)
    if record.audio_path is not None and record.audio_path not in taken:  # a sound may serve several clips
        taken.add(record.audio_path)
        yield PackedFile(name=record.audio_path, content=manifest.root / record.audio_path)


def _require_inside(source: Path, path: str) -> None:
    try:
        require_inside(path)
    except DataError as error:
        raise DataError(f"{source}: {path}: {error}.") from error
