"""Transformer families: for each class of diffusers one file with everything that is peculiar to it.

Read `protocol.py` first, then `ltx.py`, the smallest; "Adding a family" in docs/guide.md goes through it.
Called by the diffusion trainer, sampling and conversions, which find a family in `registry.py`.
Not here: noise and losses (`aiprod_ds.losses`), and adapters (`aiprod_ds.models.lora`).
"""
