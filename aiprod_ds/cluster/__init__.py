"""Runs on several hosts: what is examined before, the one command that starts them, and their end.

Read `start.py` first, then `examine.py` and `findings.py`.
Called by the commands `launch` and `doctor`; ssh runs `probe.py` and `all_reduce.py` on every host.
Not here: what a rank does once it runs (`aiprod_ds.train`), and its process group (`aiprod_ds.engine.dist`).
"""
