"""What a configuration may say: strict YAML becomes frozen records, and every problem is told at once.

Read `load.py` first, then `run.py`, which holds what all trainers share, and `phase.py`.
Called by the command line, the launcher and conversions; the records are read everywhere above.
Not here: numbers that follow from a configuration (`aiprod_ds.curriculum`), and torch.
"""
