"""A first configuration: the shipped examples, and copies of them.

Read `examples.py` first.
Called by the command `examples`.
Not here: what is checked of a configuration (`aiprod_ds.config`), and what is in a folder in full
(`aiprod_ds.survey`).
"""
