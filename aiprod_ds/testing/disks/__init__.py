"""Disks that take nothing, for tests: by faults at each write, and by small file systems of a test's own.

Read `faults.py` first. Called by tests of runs and of commands. What the product does on such disks does not
belong here: that is `aiprod_ds.bad_disk`.
"""
