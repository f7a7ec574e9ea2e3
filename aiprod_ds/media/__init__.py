"""Pictures, films and sounds of what a model does, to look at and to listen to.

Read `pictures.py` first; `clips.py` shows what was sampled, `sounds.py` what an audio model makes.
Called by the trainers' evaluation and previews, and by the command `sample`.
Not here: measures (`aiprod_ds.metrics`), plots of them (`aiprod_ds.report`), decoding (`aiprod_ds.decode`).
"""
