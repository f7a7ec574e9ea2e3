"""What is shipped beside the code: configurations, DeepSpeed settings, sample clips and launch scripts, and
how names lead to them.

Read `lookup.py` first. The files lie at the top of the repository, once; a wheel holds them in this folder.
Called by the configuration's readers, by datasets for where latents go, and by the command line.
Not here: what may stand in the files (`aiprod_ds.config`), and copies of them (`aiprod_ds.starting`).
"""
