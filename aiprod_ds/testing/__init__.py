"""What tests need, of this project and of its users: ranks, tiny models, whole runs compared.

Read `tiny.py` first, then `dist.py`, which runs a function on ranks, forked or through the real launcher.
Called by tests and benchmarks; by nothing else in the package.
Not here: tests, and anything that a run needs.
"""
