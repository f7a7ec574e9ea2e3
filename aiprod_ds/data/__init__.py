"""Clips, sounds and latents, from files to micro-batches, in an order that a resumed run repeats.

Read `sampler.py` first (which samples make which update), then `dataset.py` and `loader.py`.
Called by `aiprod_ds.trainers`, whose `clip_data.py` makes a stream of it, and by `aiprod_ds.encode`.
Not here: models, losses and engines; what leaves a worker process is tensors on the CPU.
"""
