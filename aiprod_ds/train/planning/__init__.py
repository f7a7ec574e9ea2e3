"""What a run will run with and need: the settings that `engine.parallel: auto` finds, and estimates.

Read `auto.py` first, then `estimate.py`; `trace.py` runs a trainer's own loss on shapes.
Called by the trainers and the run, and by the commands `plan` and `check --machine`.
Not here: the formulas (`aiprod_ds.planner`). Of all that trains only the unit's protocol is known.
"""
