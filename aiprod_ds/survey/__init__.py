"""What is in a folder or table before anything is trained: facts and problems of every file, counts, a
contact sheet, a page. The command `data`.

Read `run.py` first, then `findings.py`, which says what a problem is and what is done about it.
Called by the command line, which prints.
Not here: looking into files (`aiprod_ds.decode`), which of them are clips (`aiprod_ds.data`), pages of runs
(`aiprod_ds.report`).
"""
