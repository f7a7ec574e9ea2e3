"""Data of a user's own program: datasets, iterables and loaders, with items as people keep them.

Read `items.py` first: it says what an item may be. `iterables.py` says what may be iterated over.
Called by the datasets of `aiprod_ds.data` that read such items, and by the trainers.
Not here: files that a configuration names (`aiprod_ds.data`).
"""
