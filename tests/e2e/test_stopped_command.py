"""A run that its script is told to stop: one SIGTERM to the script, ranks that save, and the exit code that
says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.processes import kill_session

INTERRUPTED = 75
PATIENCE_SECONDS = 120.0

pytestmark = [pytest.mark.dist, pytest.mark.e2e, pytest.mark.slow]


def test_the_script_saves_and_says_so(in_repository_root: Path, tmp_path: Path) -> None:
    """The signal reaches launcher and ranks as one group, and the launcher sends it on to each rank and to
    its workers."""
    folder = tmp_path / "run"
    command = ["launch/train_local.sh", "configs/video_vae/tiny.yaml", str(folder)]
    command += [
        "--set",
        "report.flush_updates=1",
        "--set",
        "data.num_workers=1",
        "--set",
        "evaluation.max_clips=2",
    ]
    environment = {
        **os.environ,
        "VENV": str(Path(sys.executable).parents[1]),
        "DS_ACCELERATOR": "cpu",
        "NUM_ACCELERATORS": "2",
    }
    environment |= {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("w") as output:
        script = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _await_training(folder, script)
            script.send_signal(signal.SIGTERM)
            code = script.wait(timeout=PATIENCE_SECONDS)
        finally:
            kill_session(script.pid)
    shown = (tmp_path / "output.txt").read_text()
    assert code == INTERRUPTED, shown
    assert "launch/train_local.sh: stopped and saved; the same command goes on." in shown
    assert json.loads((folder / "report.json").read_text())["status"] == "interrupted"
    newest = CheckpointStore(folder / "checkpoints").newest()
    assert newest is not None
    assert newest.state.clock.updates == read_metrics(folder / "metrics.jsonl")[-1][0] > 0, (
        "no update is lost"
    )


def _await_training(folder: Path, script: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and "loss/total" in metrics.read_text()):
        assert script.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "no update"
        time.sleep(0.05)
