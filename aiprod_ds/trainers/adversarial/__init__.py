"""Training a VAE against a discriminator, which has an engine of its own beside the model's.

Read `adversary.py` first: the order of one micro-batch for both sides.
Called by the units of both VAE trainers, and through `aiprod_ds.train.unit.Companion` by the run.
Not here: networks (`aiprod_ds.models.discriminators`) and formulas (`aiprod_ds.losses.adversarial`).
"""
