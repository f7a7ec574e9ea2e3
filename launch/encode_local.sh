#!/usr/bin/env bash
# Encodes clips and captions on all accelerators of this machine with the deepspeed launcher:
#
#     launch/encode_local.sh CONFIG [option of `aiprod-ds encode` ...]
#
# Environment: VENV (.venv), NUM_ACCELERATORS (every GPU, or 2 CPU processes without one), DS_ACCELERATOR=cpu (no GPU).
# Exit code: that of the run, or 128 + the signal that stopped it. The same command goes on with what is left.
set -euo pipefail

if (($# < 1)); then
    echo "usage: launch/encode_local.sh CONFIG [option of \`aiprod-ds encode\` ...]" >&2
    exit 2
fi
source "$(dirname "$0")/all_accelerators.sh"

on_all_accelerators encode "$@"
exit "$code"
