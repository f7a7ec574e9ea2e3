"""Every problem of a configuration in one pass: what is wrong in a value, and between values.

Read `gather.py` first.
Called by `aiprod_ds.config.load` for files, and by the records' base when a program makes one.
Not here: the words of a broken value (`aiprod_ds.config.messages`), and the rules: they are the records'.
"""
