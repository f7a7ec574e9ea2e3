"""Kernels of the project's own, for what torch does in several passes over memory.

Each has a plain form beside its caller, which runs where Triton does not, and with which tests compare it.
Read `adamw.py` first.
Called by `aiprod_ds.engine` on GPUs alone: these modules import Triton.
Not here: whether a kernel is used.
"""
