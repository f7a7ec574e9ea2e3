"""Whether all ranks still hold the same bits of what is on every rank: whole weights, averages and buffers.

Read `check.py` first, then `sums.py` (what is summed at which update) and `verdict.py` (which rank, which
tensor).
Called by `aiprod_ds.train.loop`.
Not here: which tensors are on every rank (`aiprod_ds.engine`, `aiprod_ds.optim.ema`).
"""
