"""Whether an installation computes what it should on this machine: ten checks against closed forms, and a
training of each kind that is killed and goes on bit for bit.

Read `run.py` first; `losses.py` and `phases.py` have the ten checks, `training.py` the trainings.
Called by the command `validate`.
Not here: what a machine has (`aiprod_ds.cluster`), and the project's own tests.
"""
