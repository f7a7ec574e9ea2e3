"""Clips in shards as a manifest: what was known of each when it was packed.

Owns how a record of media stands in the index. Called by `packing.py` and, when a run opens its data, by
`aiprod_ds.trainers.open_data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.data.manifest import Manifest
from aiprod_ds.decode.record import MediaRecord, Medium
from aiprod_ds.errors import DataError
from aiprod_ds.shards.opening import open_shards
from aiprod_ds.shards.reader import ShardReader

KINDS: Mapping[Medium, str] = {"video": "clips", "sound": "sounds"}
"""What an index says of its shards, by what counted of the files when they were packed."""
_DEFAULTS = {item.name: item.default for item in fields(MediaRecord) if item.default is not MISSING}


def open_source(source: str, storage: StorageConfig) -> Path | ShardReader:
    """Returns the shards under an address or in a folder; the path itself where it is something else.

    Raises:
        DataError: If there should be shards and they cannot be opened.
    """
    return open_shards(source, storage) or Path(source)


def packed_media(shards: ShardReader, medium: Medium) -> Manifest:
    """Returns the clips of shards, in the order in which a scan gave them when they were packed; opens no
    clip.

    Raises:
        DataError: If they were packed for something else, or the index does not say what a clip is.
    """
    shards.require_kind(KINDS[medium])
    known = ((member.name, member.known) for member in shards.members.values() if member.facts)
    records = records_of(known, where=shards.address)
    return Manifest(root=Path(shards.address), records=records, medium=medium, packed=shards)


def facts_of_record(record: MediaRecord) -> dict[str, Any]:
    """Returns a record as the index holds it, without its path and what is as usual."""
    return {
        name: value
        for name, value in asdict(record).items()
        if name != "path" and (name not in _DEFAULTS or value != _DEFAULTS[name])
    }


def records_of(known: Iterable[tuple[str, Any]], *, where: str) -> tuple[MediaRecord, ...]:
    """Returns the records of which the index says `known`, in order.

    Raises:
        DataError: If one is no record.
    """
    found = []
    for name, facts in known:
        try:
            # JSON has no tuples.
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
            }
            found.append(MediaRecord(path=name, **values))
        except (TypeError, AttributeError) as error:
            raise DataError(
                f"{where}/{name}: the index must say what clip it is, got: {error}. Pack the clips "
                "again with `aiprod-ds shard`."
            ) from error
    return tuple(found)
