"""What a run needs on a kind of GPU, before it runs: memory, time and money. No torch, no files.

Read `cost.py` first, then `memory.py` and `roofline.py`, where the formulas are; `search.py` chooses by them,
and `advice.py` says what larger micro-batches would bring.
Called by `aiprod_ds.train.planning`, which finds the workloads that go in.
Not here: counting what a model computes (`aiprod_ds.models.tracing`), and tables (`aiprod_ds.report`).
"""
