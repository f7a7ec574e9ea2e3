#!/usr/bin/env bash
# Trains one configuration on all accelerators of this machine with the deepspeed launcher:
#
#     launch/train_local.sh CONFIG RUN_FOLDER [option of `aiprod-ds train` ...]
#
# Environment: VENV (.venv), NUM_ACCELERATORS (every GPU, or 2 CPU processes without one), DS_ACCELERATOR=cpu (no GPU).
# Exit code: that of the run; 75 if it was asked to stop and has saved, then the same command goes on. The launcher loses that code at
# a signal, and exits 0 when it is killed, so the report decides.
set -euo pipefail

if (($# < 2)); then
    echo "usage: launch/train_local.sh CONFIG RUN_FOLDER [option of \`aiprod-ds train\` ...]" >&2
    exit 2
fi
config=$1 run_folder=$2
printf -v typed ' %q' "$0" "$@"
shift 2
source "$(dirname "$0")/all_accelerators.sh"
# For the run's page: a rank would only know of its own command. Percent-encoded, see aiprod_ds/report/command.py.
export AIPROD_DS_COMMAND="${AIPROD_DS_COMMAND:-NUM_ACCELERATORS=$accelerators${typed//%/%25}}"

on_all_accelerators train "$config" --output-dir "$run_folder" "$@"
if ((code != 0)) && [[ -f $run_folder/metrics.jsonl && ! -f $run_folder/report.json ]]; then
    python -m aiprod_ds report "$run_folder" >&2 || true # the page of a run that was killed, which could not write it itself
fi
if ((code == 0 || code >= 128)); then
    python - "$run_folder/report.json" "$code" <<'PYTHON' && code=0 || code=$?
import json, pathlib, sys

report, code = pathlib.Path(sys.argv[1]), int(sys.argv[2])
status = json.loads(report.read_text())["status"] if report.is_file() else "missing"
if status == "interrupted":
    print("launch/train_local.sh: stopped and saved; the same command goes on.", file=sys.stderr)
    sys.exit(75)
if status != "completed":
    print(
        f"launch/train_local.sh: {report}: status must be 'completed', got '{status}'. The run ended early; see the messages above.",
        file=sys.stderr,
    )
    sys.exit(code or 1)
PYTHON
fi
exit "$code"
