"""report.html: one page with everything there is to see of a run, and the page that compares runs.

Read `run_page.py` first (from a run folder to its page), then `record.py` (what is read of a folder).
Called by `aiprod_ds.train` while a run goes on and when it ends, and by the command `report` at any time.
Not here: report.md and report.json (`aiprod_ds.report`), and making films and sounds (`aiprod_ds.media`).
"""
