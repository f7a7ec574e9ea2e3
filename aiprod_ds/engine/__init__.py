"""What owns parameters, gradients and optimizer state: DeepSpeed, or plain PyTorch as its control.

Read `protocol.py` first, then `local_engine.py`: its lines can be read against `deepspeed_engine.py`.
Called by `aiprod_ds.train`; `dist.py`, the process group, by everything that runs on several ranks.
Not here: when an update is made and at which rate (`aiprod_ds.train.loop`), and files
(`aiprod_ds.checkpoint`).
"""
