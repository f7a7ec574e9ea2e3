"""The folders of a run's checkpoints: each one whole or absent, readable on any number of ranks.

Read `store.py` first (commit, search, deletion), then `shard_files.py` (the tensors).
Called by `aiprod_ds.train`, which brings the ranks together around a save, and by `aiprod_ds.convert`.
Not here: engines and collectives (`aiprod_ds.engine`), and checkpoints of other programs
(`aiprod_ds.convert`).
"""
