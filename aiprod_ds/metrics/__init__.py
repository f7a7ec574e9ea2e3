"""The numbers of a run: measured, collected without waiting for the device, and written.

Read `metric_names.py` first (the one table of names), then `recorder.py` and `jsonl.py`.
Called by `aiprod_ds.train`; the measures of held-out clips (`quality.py` and its kind) by the trainers.
Not here: what is minimised (`aiprod_ds.losses`), and plots and pages (`aiprod_ds.report`).
"""
