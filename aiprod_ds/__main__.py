"""Lets `deepspeed --module aiprod_ds train CONFIG` and `python -m aiprod_ds` work."""

import sys

from aiprod_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
