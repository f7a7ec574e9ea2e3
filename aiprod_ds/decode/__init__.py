"""From one media file to pixels as displayed and samples as heard: exact, and the same wherever decoding
starts.

Read `video.py` first, then `sound_file.py`; `probe.py` says what a file holds.
Called by `aiprod_ds.data`, which decides which part of which file, and by `aiprod_ds.encode`.
Not here: lists of files, splits and random draws (`aiprod_ds.data`), writing of films (`aiprod_ds.media`).
"""
