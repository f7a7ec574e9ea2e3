"""Kernels in place of torch's: the project's own for what torch does in several passes over memory, and
torchao's for products in 8 bits.

One of the project's own has a plain form beside its caller, which runs where Triton does not, and with which
tests compare it.
Read `adamw.py` first.
Called by `aiprod_ds.engine` on GPUs alone: these modules import Triton or torchao.
Not here: whether a kernel is used.
"""
