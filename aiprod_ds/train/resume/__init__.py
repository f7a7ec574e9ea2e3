"""How a run goes on where it was: saving from all ranks, reading back, and what may go on from what.

Read `saver.py` first, then `compatibility.py`.
Called by `aiprod_ds.train.run` and `aiprod_ds.train.loop`.
Not here: the folders of checkpoints (`aiprod_ds.checkpoint`), and what an engine captures
(`aiprod_ds.engine`).
"""
