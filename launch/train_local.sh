#!/usr/bin/env bash
# Trains one configuration on all accelerators of this machine with the deepspeed launcher:
#
#     launch/train_local.sh CONFIG RUN_FOLDER [option of `aiprod-ds train` ...]
#
# Environment: VENV (.venv), NUM_ACCELERATORS (every GPU, or 2 CPU processes without one), DS_ACCELERATOR=cpu (no GPU).
# Exit code: that of the run. The launcher exits 0 when it is killed, so a run counts as done only if its report says so.
set -euo pipefail

if (($# < 2)); then
    echo "usage: launch/train_local.sh CONFIG RUN_FOLDER [option of \`aiprod-ds train\` ...]" >&2
    exit 2
fi
config=$1 run_folder=$2
shift 2
source "$(dirname "$0")/all_accelerators.sh"

on_all_accelerators train "$config" --output-dir "$run_folder" "$@"
if ((code == 0)); then
    python - "$run_folder/report.json" <<'PYTHON' || code=1
import json, pathlib, sys

report = pathlib.Path(sys.argv[1])
status = json.loads(report.read_text())["status"] if report.is_file() else "missing"
if status != "completed":
    sys.exit(f"launch/train_local.sh: {report}: status must be 'completed', got '{status}'. The run ended early; see the messages above.")
PYTHON
fi
exit "$code"
