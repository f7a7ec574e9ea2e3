"""The curriculum in numbers: what each phase does, for how long, and when it ends. No torch, no files.

Read `phase.py` first (the records), then `plan.py` (how they are derived) and `scheduler.py`.
Called by the trainers and the loop; data, planner and report read its records.
Not here: what a configuration may say (`aiprod_ds.config`), and memory or time (`aiprod_ds.planner`).
"""
