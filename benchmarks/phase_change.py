"""How long is a run between two phases, against stopping it and starting a new process for the next phase?

Both sides train the quickstart's tiny LTX-Video VAE on the shipped clips, one process, ZeRO-1 fp32, 64x64 and
9 frames, then 96x96 and 17 frames. The first changes the phase inside the run. The second trains the first
phase, ends, and a new process goes on from its checkpoint with the second phase added. Both times are read
from outside: from the moment when the row of the first phase's last update appears in metrics.jsonl to the
row of the next update, less that update's own computing and the wait for its first batch. Evaluation and
checkpoint at the edge are part of both.

    python benchmarks/phase_change.py --output benchmarks/results/NAME.json

It does not show GPUs, several ranks, large models (whose checkpoints take longer) or phases that rebuild the
engine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from result_file import figure, write_result

from aiprod_ds.metrics.jsonl import read_metrics

_ROOT = Path(__file__).parents[1]
_UPDATES = 5
_GOAL_SECONDS = 10.0


def main() -> None:
    """Measures both sides in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="A phase change inside a run against a restart.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    inside: list[float] = []
    restarted: list[float] = []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            inside.append(_seconds(Path(folder), phases_of_each_process=(2,)))
        with tempfile.TemporaryDirectory() as folder:
            restarted.append(_seconds(Path(folder), phases_of_each_process=(1, 2)))
    metric = "seconds between the phases"
    rows = [
        figure("inside the run", metric, "s", inside, goal=_GOAL_SECONDS),
        figure("stop and restart", metric, "s", restarted),
    ]
    write_result(arguments.output, "phase_change", rows)


def _seconds(folder: Path, *, phases_of_each_process: tuple[int, ...]) -> float:
    metrics = folder / "run" / "metrics.jsonl"
    seen: dict[int, float] = {}
    for phases in phases_of_each_process:
        config = folder / f"{phases}_phases.yaml"
        config.write_text(yaml.safe_dump(_config(phases)))
        command = [
            sys.executable,
            "-m",
            "aiprod_ds",
            "train",
            str(config),
            "--output-dir",
            str(folder / "run"),
        ]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=_ROOT, env=environment, stderr=output)
            while process.poll() is None:
                _note_new_rows(metrics, seen)
                time.sleep(0.005)
        assert process.returncode == 0, log.read_text()
    first = next(
        row for update, row in read_metrics(metrics) if update == _UPDATES + 1 and "loss/total" in row
    )
    return seen[_UPDATES + 1] - seen[_UPDATES] - first["time/update_seconds"]


def _note_new_rows(metrics: Path, seen: dict[int, float]) -> None:
    rows = read_metrics(metrics) if metrics.is_file() else []
    for update, row in rows:
        if "loss/total" in row:
            seen.setdefault(update, time.monotonic())


def _config(phases: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((_ROOT / "configs" / "video_vae" / "tiny.yaml").read_text())
    config["curriculum"]["phases"] = config["curriculum"]["phases"][:phases]
    for phase in config["curriculum"]["phases"]:
        phase |= {"updates": _UPDATES, "warmup_updates": 1}
    return config | {"report": {"flush_updates": 1}}


if __name__ == "__main__":
    main()
