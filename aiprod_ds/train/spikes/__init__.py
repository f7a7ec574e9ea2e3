"""Spikes: updates at which training goes wrong, and the way back to before them.

Read `detector.py` first, then `baseline.py` (how high is too high), `rollbacks.py` (what was decided, in the
run folder and in every checkpoint) and `going_back.py` (the decision: to which checkpoint, or that the run
stops).
Called by `aiprod_ds.train.loop` and `aiprod_ds.train.run`.
Not here: updates that are skipped (`aiprod_ds.train.overflow`), and reading a checkpoint.
"""
