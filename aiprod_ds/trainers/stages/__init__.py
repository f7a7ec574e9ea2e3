"""Stages of a VAE's training: what a phase trains of it, with which weights of the loss, on which latents.

Read `parts.py` first: what a unit asks of its stages.
Called by the trainers of VAEs, when they plan and when they train.
Not here: the change of engine between two phases (`aiprod_ds.train.phase_change`).
"""
