"""Many small files in few large ones, on a disk, a web server or object storage: tar files with an index
beside them.

Read `reader.py` first, which gives the bytes of any packed file, wherever the shards are.
Called by `aiprod_ds.data`, which knows what is in the files, and by `aiprod-ds shard`.
Not here: what latents or clips are (`aiprod_ds.data`) and which comes when (`aiprod_ds.data.sampler`).
"""
