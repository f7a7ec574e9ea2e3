"""Runs that are disturbed again and again, by `benchmarks/soak.py`: nobody has to do anything, a kill costs
at most what was done since the last save, and they end like the run that nobody disturbed.

The restart rule and the supervisor are those of `aiprod-ds launch`. Ranks are forked, with a stand-in for
DeepSpeed's launcher, but for the last test, in which the real one is killed. `make test` has one disturbance
of five kinds each; the exhaustive cases are 50 kills, half of them inside a save, and all kinds with a part
under the real launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.processes import kill_session, run_in_own_session

ROOT = Path(__file__).resolve().parents[2]
SOAKS = [
    pytest.param(["--tiny"], id="five_kinds"),
    pytest.param(
        ["--kinds", "kills", "--disturbances", "50", "--launched", "0"],
        id="50_kills",
        marks=pytest.mark.exhaustive,
    ),
    pytest.param(["--disturbances", "30", "--launched", "0.2"], id="30_mixed", marks=pytest.mark.exhaustive),
]
SAVED_EVERY, UPDATES = 5, 150
PATIENCE_SECONDS = 480.0  # 15 where nothing else runs

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", params=SOAKS)
def soaked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rows of the result, as (case, metric): value, and `options`."""
    output = tmp_path_factory.mktemp("soak") / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *request.param, "--output", str(output)]
    code, said = run_in_own_session(command, timeout_seconds=3600, environment=_environment())
    assert output.exists(), said[-8000:]
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(output.read_text())["rows"]}
    return {"rows": rows, "options": request.param, "code": code, "said": said[-8000:]}


def test_nobody_has_to_do_anything(soaked: dict[str, Any]) -> None:
    rows, options = soaked["rows"], soaked["options"]
    wanted = int(options[options.index("--disturbances") + 1]) if "--disturbances" in options else 4
    assert rows["all", "manual actions"] == 0, soaked["said"]
    assert rows["all", "disturbances"] >= wanted
    assert rows["all", "restarts"] > 0
    assert soaked["code"] == 0, soaked["said"]


def test_a_kill_loses_at_most_what_was_done_since_the_last_save(soaked: dict[str, Any]) -> None:
    rows = soaked["rows"]
    assert 0 < rows["all", "most lost updates of a kill"] <= SAVED_EVERY, soaked["said"]
    asynchronous = rows["all", "most lost updates of a kill, saved while it trained"]
    assert asynchronous < 2 * SAVED_EVERY, soaked["said"]
    if "kills" in soaked["options"]:
        assert rows["inside a save", "disturbances"] >= 15
        assert rows["all", "saves cut in two"] > 0


def test_a_disturbed_run_ends_like_the_one_that_nobody_disturbed(soaked: dict[str, Any]) -> None:
    rows = soaked["rows"]
    assert rows["all", "runs equal"] == rows["all", "runs that promise it"] > 0, soaked["said"]


def test_launch_starts_again_when_deepspeeds_launcher_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the first checkpoint: DeepSpeed's program that starts ranks, which then exits with 0. The
    rank finds that out, saves and leaves: nothing that was done is lost."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from forked_launch import Job

    write_synthetic_clips(tmp_path / "clips", num_clips=4, frames=6, height=16, width=16, with_sound=False)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config(tmp_path)))
    run, output = tmp_path / "run", tmp_path / "output"
    command = [sys.executable, "-m", "aiprod_ds", "launch", str(tmp_path / "config.yaml"), str(run)]
    command += ["--hostfile", str(tmp_path / "hosts"), "--no-ssh", "--node-rank", "0", "--max-restarts", "2"]
    with output.open("wb") as file:
        launch = subprocess.Popen(
            command, stdout=file, stderr=file, env=_environment(), cwd=ROOT, start_new_session=True
        )
    launchers: tuple[int, ...] = ()
    try:
        _await(lambda: any((run / "checkpoints").glob("update_*[0-9]")) or launch.poll() is not None)
        launchers = Job.of(launch.pid).launchers
        assert len(launchers) == 2, output.read_text(errors="replace")
        done = read_metrics(run / "metrics.jsonl")[-1][0]
        os.kill(launchers[-1], signal.SIGKILL)
        code = launch.wait(timeout=PATIENCE_SECONDS)
    finally:
        kill_session(launch.pid)
        for leader in launchers[:1]:
            kill_session(leader)
    said = output.read_text(errors="replace")
    assert code == 0, said[-8000:]
    assert len(re.findall("restarting restart=", said)) == 1, said[-8000:]
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], report["updates"]) == ("completed", UPDATES)
    assert len(report["resumed_from"]) == 1
    assert int(report["resumed_from"][0].removeprefix("update_")) >= done >= SAVED_EVERY


def _config(folder: Path) -> dict[str, Any]:
    phase = {"name": "only", "resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-3}
    return {
        "trainer": "video_vae",
        "output_dir": "named_by_the_command",
        "model": {
            "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
            "spatial_stride": 4,
            "temporal_stride": 2,
        },
        "data": {"train": str(folder / "clips"), "validation": str(folder / "clips"), "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**phase, "global_batch_size": 2, "updates": UPDATES}]},
        "engine": {"deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "checkpoint": {"every_updates": SAVED_EVERY, "keep_last": 2},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        "report": {"flush_updates": 1},
    }


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.005)
