"""What follows an engine from update to update: the average of its weights, and the adaptive clip.

Read `ema.py` first.
Called by the loop after every update, and when a run saves and resumes.
Not here: AdamW, which the engines have, and the learning rate (`aiprod_ds.curriculum.lr`).
"""
