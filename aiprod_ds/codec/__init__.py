"""Frozen VAEs at work: clips to normalised latents and back.

Read `encoders.py` first; `decoders.py` is the way back.
Called by `aiprod_ds.encode`, and by the diffusion trainer for previews and the fingerprints of its latents.
Not here: VAEs that are trained (`aiprod_ds.models`), and files of latents (`aiprod_ds.data.latents`).
"""
