"""Discriminators of the VAE trainers: small networks that tell reconstructions from data, patch by patch.

Read `judgement.py` first, then `patch.py`, the simplest; docs/guide.md names where each was published.
Called by the adversarial part of the VAE trainers.
Not here: losses (`aiprod_ds.losses.adversarial`), and training (`aiprod_ds.trainers.adversarial`).
"""
