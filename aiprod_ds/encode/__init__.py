"""Trained models at work: clips and captions become latents and embeddings, prompts become clips.

Read `run.py` first, which is the command `encode`; `sample.py` is the command `sample`.
Called by the command line alone.
Not here: the VAEs (`aiprod_ds.codec`), the files of latents (`aiprod_ds.data.latents`) and the mathematics of
sampling (`aiprod_ds.models.sampling`).
"""
