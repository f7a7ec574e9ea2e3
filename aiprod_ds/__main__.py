"""Lets `deepspeed --module aiprod_ds train CONFIG` and `python -m aiprod_ds` work."""

import gc
import sys

from aiprod_ds.cli import main

if __name__ == "__main__":
    try:
        code = main()
    finally:
        # On its way out the interpreter would look through every object of torch and DeepSpeed several times:
        # seconds of every core, in which a launcher seems to hang although the run has said that it is done.
        gc.freeze()
    sys.exit(code)
