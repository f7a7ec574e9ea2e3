"""The three trainers: what is trained, on which clips, by which loss; each gives its unit to the one loop.

Read `base.py` first (the order of preparation), then `video_vae.py`, the simplest.
Called by the command line, and by users as `aiprod_ds.VideoVAETrainer` and so on.
Not here: a loop, an engine or checkpoints of their own (`aiprod_ds.train`), and formulas
(`aiprod_ds.losses`).
"""
