"""A first configuration: the shipped examples, and one that is written for a folder of media and a machine.

Read `begin.py` first; `look.py` says what is in a folder, `draft.py` chooses phases, `fit.py` batches, and
`write.py` makes the text.
Called by the commands `examples` and `init`.
Not here: what is checked of a configuration (`aiprod_ds.config`), and what is in a folder in full
(`aiprod_ds.survey`).
"""
