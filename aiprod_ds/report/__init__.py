"""What people read: the console, report.md and its plots, report.html, and the tables that commands print.

Read `summary.py` first (the record of a run), then `run_report.py`.
Called by `aiprod_ds.train`, and by the command line for its tables.
Not here: the numbers themselves (`aiprod_ds.metrics`), and pictures and sounds (`aiprod_ds.media`).
"""
