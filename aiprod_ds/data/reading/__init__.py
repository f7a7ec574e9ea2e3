"""Reading that goes on: clips that cannot be read, workers that die, and all clips read beforehand.

Read `replacing.py` first.
Called by `aiprod_ds.data.loader`, by `aiprod_ds.trainers` for held-out clips, and by `check --read-all`.
Not here: which clip comes when (`aiprod_ds.data.sampler`), decoding (`aiprod_ds.decode`), and what becomes of
the list of bad clips (`aiprod_ds.train`).
"""
