"""The one loop and what stands around it, from a unit and a plan to a report. Knows no modality.

Read `unit.py` first (what a trainer supplies), then `loop.py`, `phase_change.py` and `run.py`.
Called by `aiprod_ds.trainers`; the command line asks `planning/` alone.
Not here: what depends on what a clip holds (`aiprod_ds.trainers`), and how an update is computed
(`aiprod_ds.engine`).
"""
