#!/usr/bin/env bash
# Trains one configuration on several hosts:
#
#     launch/train.sh CONFIG RUN_FOLDER --hostfile F [option of `aiprod-ds launch` ...]
#
# Checks hostfile, environment, configuration and every host, prints the deepspeed command, runs it, and judges the run by its own
# report. docs/clusters.md says what the hosts need; `launch/train.sh --help` lists the options.
#
# Environment: VENV (.venv). Exit code: 0 only if the run is completed, 2 bad input (nothing was started), else that of the run.
set -euo pipefail

venv=${VENV:-$(dirname "$0")/../.venv}
if [[ ! -x $venv/bin/python ]]; then
    echo "launch/train.sh: $venv has no python. Run: make venv" >&2
    exit 1
fi
PATH=$(realpath "$venv/bin"):$PATH # DeepSpeed finds `ninja` by name
export PATH
exec python -m aiprod_ds launch "$@"
