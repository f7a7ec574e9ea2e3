"""Weights of one form as another: checkpoints, folders of diffusers, single files and LoRA.

Read `run.py` first, then `sources.py`, which opens whatever a conversion starts from.
Called by the commands `convert` and `inspect`, and by `tools/`.
Not here: writing a run's checkpoints (`aiprod_ds.checkpoint`) or its exports (`aiprod_ds.trainers`).
"""
