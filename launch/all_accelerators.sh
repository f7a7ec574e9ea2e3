# Runs one command of aiprod_ds on all accelerators of this machine with the deepspeed launcher. Sourced by the scripts beside it.
#
# Environment: VENV (.venv), NUM_ACCELERATORS (every GPU, or 2 CPU processes without one), DS_ACCELERATOR=cpu (no GPU).
# shellcheck shell=bash

script=launch/$(basename "$0")
venv=${VENV:-$(dirname "$0")/../.venv}
if [[ ! -x $venv/bin/deepspeed ]]; then
    echo "$script: $venv has no deepspeed. Run: make venv" >&2
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

# Usage: on_all_accelerators COMMAND [ARGUMENT ...]
# Sets `code` to the launcher's exit code, which is 0 if something else kills it, or to 128 + the signal that this script got.
on_all_accelerators() {
    code=0
    local level=warning # of the launcher alone: it would print its commands and one line for each rank
    if [[ " $* " == *" --verbose "* ]]; then
        level=info
    fi
    # A session of its own makes launcher and ranks one process group: a signal to the launcher alone would leave the ranks running.
    setsid deepspeed --log_level "$level" --num_accelerators "$accelerators" --master_addr 127.0.0.1 --master_port "$port" --module aiprod_ds "$@" &
    launcher=$!
    trap 'kill -TERM -- "-$launcher" 2>/dev/null' INT TERM HUP
    wait "$launcher" || code=$?
    if ((code >= 128)); then # the launcher alone was killed, which leaves the ranks running, or the trap has sent this already
        kill -TERM -- "-$launcher" 2>/dev/null || true
    fi
    local patience=$((SECONDS + 120))
    while kill -0 -- "-$launcher" 2>/dev/null; do # `wait` also returns at a signal; the ranks may still be saving
        if ((SECONDS > patience)); then
            echo "$script: a process of the run did not end within 120 s; killing the group." >&2
            kill -KILL -- "-$launcher" 2>/dev/null || true
        fi
        sleep 0.2
    done
}
