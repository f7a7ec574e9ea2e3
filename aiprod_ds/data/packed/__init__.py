"""Latents and media in shards: what is packed, what the index says of it, and clips that are read out of it.

Read `packing.py` first, which turns a folder or a table into shards.
Called by `aiprod_ds.trainers` when it opens data, by `aiprod-ds shard` and by `encode`.
Not here: the shards themselves, their cache and where they lie (`aiprod_ds.shards`).
"""
