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

venv=${VENV:-$(dirname "$0")/../.venv}
if [[ ! -x $venv/bin/deepspeed ]]; then
    echo "launch/train_local.sh: $venv has no deepspeed. Run: make venv" >&2
    exit 1
fi
PATH=$(realpath "$venv/bin"):$PATH # the launcher starts `python` and `ninja` by name
export PATH

gpus=0
if [[ ${DS_ACCELERATOR:-} != cpu ]]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
fi
accelerators=${NUM_ACCELERATORS:-$((gpus > 0 ? gpus : 2))}
threads=$(($(nproc) / accelerators))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# A session of its own makes launcher and ranks one process group: a signal to the launcher alone would leave the ranks running.
setsid deepspeed --num_accelerators "$accelerators" --master_addr 127.0.0.1 --master_port "$port" \
    --module aiprod_ds train "$config" --output-dir "$run_folder" "$@" &
launcher=$!
trap 'kill -TERM -- "-$launcher" 2>/dev/null' INT TERM HUP

code=0
wait "$launcher" || code=$?
patience=$((SECONDS + 120))
while kill -0 -- "-$launcher" 2>/dev/null; do # `wait` also returns at a signal; the ranks may still be saving
    if ((SECONDS > patience)); then
        echo "launch/train_local.sh: a process of the run did not end within 120 s; killing the group." >&2
        kill -KILL -- "-$launcher" 2>/dev/null || true
    fi
    sleep 0.2
done

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
