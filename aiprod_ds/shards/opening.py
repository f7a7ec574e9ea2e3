"""From what a configuration names to shards that can be read: their storage, index and cache.

Called by `aiprod_ds.data.packed`.
"""

from __future__ import annotations

from pathlib import Path

from aiprod_ds.config.data import StorageConfig
from aiprod_ds.shards.cache import ShardCache, default_cache_folder
from aiprod_ds.shards.index import has_shards, read_index
from aiprod_ds.shards.reader import ShardReader
from aiprod_ds.shards.storage import FolderStorage, Storage, is_remote, open_storage


def open_shards(source: str, settings: StorageConfig) -> ShardReader | None:
    """Returns the shards under an address or in a folder; None if it is a path where none are.

    Raises:
        DataError: If an address cannot be used, or the index is missing, damaged or not that of the shards.
    """
    storage: Storage
    if is_remote(source) or source.startswith("file://"):
        storage = open_storage(source, endpoint_url=settings.endpoint_url)
    elif Path(source).is_dir() and has_shards(path.name for path in Path(source).iterdir()):
        storage = FolderStorage(Path(source))
    else:
        return None
    cache = None
    if settings.cache_gb > 0:
        folder = default_cache_folder() if settings.cache_dir is None else Path(settings.cache_dir)
        cache = ShardCache(folder, limit_bytes=int(settings.cache_gb * 1e9))
    index = read_index(storage)  # with little patience: a wrong address is told soon
    storage.patience_seconds = settings.patience_seconds
    return ShardReader(storage, index, cache=cache)
