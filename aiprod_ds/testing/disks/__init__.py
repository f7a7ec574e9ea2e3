"""Disks that take nothing, for tests: by faults at each write, and by small file systems of a test's own.

Read `faults.py` first, then `small.py`.
Called by tests of runs and of commands.
Not here: what the product does on such disks (`aiprod_ds.bad_disk`).
"""
