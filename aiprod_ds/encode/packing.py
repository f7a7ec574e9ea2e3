"""Packs what was encoded into shards, where a configuration asks for them; `run.py` calls it at the end."""

from __future__ import annotations

from pathlib import Path

from aiprod_ds.config.encode import EncodeConfig
from aiprod_ds.data.packed.packing import pack_latents
from aiprod_ds.shards.storage import open_storage


def pack_encoded(config: EncodeConfig, entries: Path) -> str:
    """Returns in words what was packed; empty if nothing is to be. Runs on the main rank.

    Args:
        config: Names the media and the shards.
        entries: The folder of the latents.

    Raises:
        DataError: If the shards cannot be written, or others lie there.
    """
    wanted = config.data.shards
    if wanted is None:
        return ""
    storage = open_storage(wanted.output, endpoint_url=wanted.endpoint_url)
    index = pack_latents(
        Path(config.data.media),
        storage,
        shard_bytes=int(wanted.shard_mb * 1e6),
        root=entries,
        skip_missing=True,
    )
    return f"Packed {len(index.members)} files into {len(index.shards)} shards: {storage.address}"
