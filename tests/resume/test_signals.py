"""Signals, request files and SIGKILLs at random moments: what is saved, what is lost, and that the run goes
on bitwise.

A process that has imported everything forks the ranks of each attempt. Two ranks train on DeepSpeed,
one on the local engine with a worker that decodes ahead. Moments are what the run's own log and metrics tell,
plus a random part of an update.

Two ranks are also killed by SIGKILL, at least three times in ten inside a save. Half of the attempts save
while training goes on. In two attempts of seven a real deepspeed launcher starts the ranks and one of its two
processes is killed: `runner`, which the user starts, or `launch`, which starts the ranks. The ranks find that
out, save and leave. Without the exhaustive tests every moment, way and target comes once, but for `launch`,
which test_soak.py kills; with them a run is killed 50 times, which is the promise.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.testing.dist import run_forked
from aiprod_ds.testing.processes import kill_session, launcher_command

SAVED_EVERY = 5
LAUNCHER = ("runner", "launch")
TARGETS = ("rank 0", "rank 1", "all", "runner", "rank 1", "rank 0", "launch")
UPDATES_PER_PHASE = 15  # a kill takes the run forward by some four updates, a stop by up to a phase
WITHIN_SECONDS = 25.0
ORPHAN_SECONDS = 60.0  # 10 where nothing else runs; most of it is the end of the processes
INTERRUPTED = 75
MOMENTS = ("resumed", "row", "phase_begins", "row", "phase_ends", "row")
HOW = ("SIGTERM to rank 0", "SIGUSR1 to the last rank", "SIGTERM to all", "SIGUSR1 to all", "STOP")

Sweep = dict[str, int]
SWEEPS = [
    pytest.param({"ranks": 2, "stops": len(HOW), "kills": len(TARGETS) - 1, "phases": 8}, id="2_ranks"),
    pytest.param({"ranks": 1, "stops": len(MOMENTS), "kills": 0, "phases": 7}, id="1_rank"),
    *(
        pytest.param(
            {"ranks": ranks, "stops": len(HOW) * len(MOMENTS), "kills": kills, "phases": 20},
            id=f"{ranks}_ranks_often",
            marks=pytest.mark.exhaustive,
        )
        for ranks, kills in ((2, 50), (1, 0))
    ),
]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", params=SWEEPS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sweep: Sweep = request.param
    arguments = {"folder": str(tmp_path_factory.mktemp("signals")), "sweep": sweep}
    seconds = 400 + 30 * (sweep["stops"] + sweep["kills"])
    found: dict[str, Any] = run_forked(serve, arguments=arguments, timeout_seconds=seconds)
    return {**found, "wanted": sweep}


def test_every_request_saves_and_leaves_in_time(outcome: dict[str, Any]) -> None:
    assert len(outcome["stops"]) == outcome["wanted"]["stops"]
    for stop in outcome["stops"]:
        assert stop["codes"] == [INTERRUPTED] * outcome["wanted"]["ranks"], stop
        assert stop["seconds"] < WITHIN_SECONDS, stop
        assert stop["status"] == "interrupted", stop


def test_no_update_is_lost(outcome: dict[str, Any]) -> None:
    for stop in outcome["stops"]:
        assert stop["saved"] == stop["done"], stop
    assert len({stop["saved"] for stop in outcome["stops"]}) > len(outcome["stops"]) // 2, (
        "at different moments"
    )


def test_a_file_asks_for_a_checkpoint_and_goes_away(outcome: dict[str, Any]) -> None:
    assert outcome["asked_for"], "checkpoints that no setting asks for"
    assert outcome["left_files"] == []


def test_the_stopped_run_ends_like_the_one_that_nobody_stopped(outcome: dict[str, Any]) -> None:
    assert outcome["stopped"]["sha256"] == outcome["whole"]["sha256"]
    assert outcome["stopped"]["rows"] == outcome["whole"]["rows"]
    assert len(outcome["whole"]["rows"]) >= outcome["wanted"]["phases"] * UPDATES_PER_PHASE


@pytest.mark.parametrize("outcome", SWEEPS[::2], indirect=True)
def test_a_kill_loses_at_most_what_was_done_since_the_last_save(outcome: dict[str, Any]) -> None:
    kills = outcome["kills"]
    assert len(kills) == outcome["wanted"]["kills"]
    assert sum(kill["inside_a_save"] for kill in kills) >= _inside_a_save(len(kills))
    assert {kill["target"] for kill in kills} == set(TARGETS[: len(kills)])
    for kill in kills:
        # A save that was not finished when the next was due is the one before.
        allowed = 2 * SAVED_EVERY - 1 if kill["asynchronous"] else SAVED_EVERY
        assert kill["done"] - kill["saved"] <= allowed, kill


@pytest.mark.parametrize("outcome", SWEEPS[::2], indirect=True)
def test_the_killed_run_ends_like_the_one_that_nobody_killed(outcome: dict[str, Any]) -> None:
    assert outcome["killed"]["sha256"] == outcome["whole"]["sha256"]
    assert outcome["killed"]["rows"] == outcome["whole"]["rows"]


# Below runs in the server and in the ranks that it forks.


def serve(folder: str, sweep: Sweep) -> dict[str, Any]:
    """Trains a whole run, one that is stopped again and again and one that is killed so; returns what was
    seen."""
    from aiprod_ds.testing.forked import wait_for_ranks
    from aiprod_ds.train import interrupts as requests

    requests.LOOK_SECONDS = 0.1  # an update takes about 20 ms
    ranks = sweep["ranks"]
    chance = random.Random(ranks)
    whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
    assert wait_for_ranks(_start(whole, sweep)) == [0] * ranks, "the run that nobody stops"
    stops = []
    for number in range(sweep["stops"]):
        stops.append(
            _stop_once(stopped, sweep, chance, MOMENTS[number % len(MOMENTS)], HOW[number % len(HOW)])
        )
    processes = _start(stopped, sweep)
    asked_for = _ask_for_a_checkpoint(stopped)
    assert wait_for_ranks(processes) == [0] * ranks, "the last attempt"
    left_files = [name for name in ("SAVE", "STOP") if (stopped / name).exists()]
    outcome = {"stops": stops, "asked_for": asked_for, "left_files": left_files}
    outcome |= {"whole": _result(whole), "stopped": _result(stopped)}
    if sweep["kills"]:
        outcome |= _kill(Path(folder) / "killed", sweep, chance)
    return outcome


def _stop_once(folder: Path, sweep: Sweep, chance: random.Random, moment: str, how: str) -> dict[str, Any]:
    from aiprod_ds.checkpoint.store import CheckpointStore
    from aiprod_ds.testing.forked import wait_for_ranks

    log = Path(f"{folder}.log")
    before = len(_lines(log))
    processes = _start(folder, sweep)
    event = "training_begins" if moment == "resumed" else moment
    if moment == "row":
        _await_phase(folder, before)
        _await_rows(folder, chance.randint(1, 8))
    else:
        _await(lambda: any(event in line for line in _lines(log)[before:]))
    time.sleep(chance.uniform(0.0, 0.05))
    began = time.monotonic()
    if how == "STOP":
        (folder / "STOP").touch()
    else:
        targets = {"rank 0": processes[:1], "the last rank": processes[-1:], "all": processes}[
            how.partition(" to ")[2]
        ]
        for process in targets:
            os.kill(process, signal.Signals[how.partition(" ")[0]])
    codes = wait_for_ranks(processes)
    newest = CheckpointStore(folder / "checkpoints").newest()
    return {
        "moment": moment,
        "how": how,
        "codes": codes,
        "seconds": time.monotonic() - began,
        "saved": None if newest is None else newest.state.clock.updates,
        "done": _last_update(folder),
        "status": json.loads((folder / "report.json").read_text())["status"],
    }


def _kill(folder: Path, sweep: Sweep, chance: random.Random) -> dict[str, Any]:
    """Kills a run again and again, goes on to its end, and returns what was seen."""
    from aiprod_ds.testing.forked import wait_for_ranks

    kills: list[dict[str, Any]] = []
    while len(kills) < sweep["kills"]:
        missing = _inside_a_save(sweep["kills"]) - sum(kill["inside_a_save"] for kill in kills)
        in_save = len(kills) % 2 == 0 or missing >= sweep["kills"] - len(kills)
        kills.append(_kill_once(folder, sweep, chance, len(kills), in_save=in_save))
    codes = wait_for_ranks(_start(folder, sweep, every_updates=SAVED_EVERY))
    assert codes == [0] * sweep["ranks"], "the last attempt"
    return {"kills": kills, "killed": _result(folder)}


def _inside_a_save(kills: int) -> int:
    return -(-3 * kills // 10)


def _kill_once(
    folder: Path, sweep: Sweep, chance: random.Random, number: int, *, in_save: bool
) -> dict[str, Any]:
    from aiprod_ds.checkpoint.store import CheckpointStore

    target, asynchronous = TARGETS[number % len(TARGETS)], number % 4 in (1, 2)
    checkpoint = {"every_updates": SAVED_EVERY, "asynchronous": asynchronous}
    if target in LAUNCHER:
        inside_a_save = _kill_launcher(folder, sweep, chance, checkpoint, target, in_save=in_save)
    else:
        # To find out that a rank is gone takes the others some seconds, so only a quarter of them gets the
        # time.
        patience = None if number % 4 == 0 else chance.uniform(0.0, 0.2)
        inside_a_save = _kill_ranks(
            folder, sweep, chance, checkpoint, target, in_save=in_save, patience_seconds=patience
        )
    newest = CheckpointStore(folder / "checkpoints").newest()
    return {
        "target": target,
        "asynchronous": asynchronous,
        "inside_a_save": inside_a_save,
        "saved": 0 if newest is None else newest.state.clock.updates,
        "done": _last_update(folder),
    }


def _kill_ranks(
    folder: Path,
    sweep: Sweep,
    chance: random.Random,
    checkpoint: dict[str, Any],
    target: str,
    *,
    in_save: bool,
    patience_seconds: float | None,
) -> bool:
    """Kills one rank, or all, and after a time the others too; returns whether that was inside a save."""
    from aiprod_ds.testing.forked import wait_for_ranks

    before = len(_lines(Path(f"{folder}.log")))
    processes = _start(folder, sweep, **checkpoint)
    _await_phase(folder, before)
    _await_moment_to_kill(folder, chance, in_save=in_save)
    inside_a_save = _is_saving(folder)
    for process in processes if target == "all" else [processes[int(target[-1])]]:
        os.kill(process, signal.SIGKILL)
    if patience_seconds is not None:
        time.sleep(patience_seconds)
        for process in processes:
            os.kill(
                process, signal.SIGKILL
            )  # the dead wait for `wait_for_ranks`, so their ids are still theirs
    codes = wait_for_ranks(processes)
    assert any(code != 0 for code in codes), f"the run has ended before it was killed often enough: {codes}"
    return inside_a_save


def _kill_launcher(
    folder: Path,
    sweep: Sweep,
    chance: random.Random,
    checkpoint: dict[str, Any],
    target: str,
    *,
    in_save: bool,
) -> bool:
    """Kills a process of the launcher and waits for the ranks to save and leave; returns whether that was
    inside a save."""
    before = len(_lines(Path(f"{folder}.log")))
    arguments = [__file__, str(folder), json.dumps(sweep), json.dumps(checkpoint)]
    command = [*launcher_command(ranks=sweep["ranks"]), *arguments]
    with Path(f"{folder}_launcher.txt").open("w") as output:
        runner = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        _await_phase(folder, before)
        (launch,) = _children(runner.pid)
        orphans = _children(launch)
        _await_moment_to_kill(folder, chance, in_save=in_save)
        inside_a_save = _is_saving(folder)
        assert len(orphans) == sweep["ranks"], orphans
        assert all(_is_running(process) for process in orphans), (
            "the run has ended before it was killed often enough"
        )
        killed_at = time.monotonic()
        os.kill({"runner": runner.pid, "launch": launch}[target], signal.SIGKILL)
        _await(lambda: not any(_is_running(process) for process in orphans))
        assert time.monotonic() - killed_at < ORPHAN_SECONDS
        assert json.loads((folder / "report.json").read_text())["status"] == "interrupted"
        assert _last_update(folder) == _newest_saved(folder), "nothing is lost"
    finally:
        kill_session(runner.pid)
        runner.wait(timeout=30)
    return inside_a_save


def _newest_saved(folder: Path) -> int:
    from aiprod_ds.checkpoint.store import CheckpointStore

    newest = CheckpointStore(folder / "checkpoints").newest()
    assert newest is not None
    return newest.state.clock.updates


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _is_running(process: int) -> bool:
    """A process that is dead but not waited for has closed its files."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def _await_phase(folder: Path, lines_before: int) -> None:
    _await(lambda: any("phase_begins" in line for line in _lines(Path(f"{folder}.log"))[lines_before:]))


def _await_rows(folder: Path, count: int) -> None:
    rows = len(_lines(folder / "metrics.jsonl"))
    _await(lambda: len(_lines(folder / "metrics.jsonl")) >= rows + count)


def _await_moment_to_kill(folder: Path, chance: random.Random, *, in_save: bool) -> None:
    if in_save:
        _await(lambda: any((folder / "checkpoints").glob("*.pending/engine/*")), poll_seconds=0.0)
        time.sleep(chance.uniform(0.0, 0.01))
    else:
        _await_rows(folder, chance.randint(1, 2 * SAVED_EVERY))
        time.sleep(chance.uniform(0.0, 0.02))


def _is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.pending"))


def _ask_for_a_checkpoint(folder: Path) -> list[str]:
    """Returns the checkpoints that appear after a file SAVE."""
    before = {path.name for path in (folder / "checkpoints").glob("update_*")}
    done = _last_update(folder)
    _await(
        lambda: _last_update(folder) > done
    )  # a row of an evaluation is no update: its checkpoint is there already
    (folder / "SAVE").touch()
    _await(lambda: not (folder / "SAVE").exists())
    return sorted({path.name for path in (folder / "checkpoints").glob("update_*")} - before)


def _start(folder: Path, sweep: Sweep, **checkpoint: Any) -> list[int]:
    from aiprod_ds.testing.forked import fork_ranks

    ranks = sweep["ranks"]
    return fork_ranks(partial(_train, folder, sweep, checkpoint), ranks=ranks, is_launched=ranks > 1)


def _train(folder: Path, sweep: Sweep, checkpoint: dict[str, Any]) -> int:
    import torch

    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.data.synthetic import SyntheticVideoDataset
    from aiprod_ds.engine import dist
    from aiprod_ds.report.summary import RunStatus
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    with dist.process_group(timeout_seconds=60), without_plots():
        if dist.is_main():
            logging.getLogger("aiprod_ds").addHandler(logging.FileHandler(f"{folder}.log"))
            logging.getLogger("aiprod_ds").setLevel(logging.INFO)
        torch.manual_seed(0)
        clips = {
            "dataset": SyntheticVideoDataset(6, 5, 24, 24),
            "validation": SyntheticVideoDataset(4, 5, 24, 24, seed=1),
        }
        config = VAETrainerConfig.model_validate(_config(folder, sweep, checkpoint))
        summary = VideoVAETrainer(config, model=TinyVideoVAE(), **clips).train(resume="auto")
    return 0 if summary.status is RunStatus.COMPLETED else INTERRUPTED


def _config(folder: Path, sweep: Sweep, checkpoint: dict[str, Any]) -> dict[str, Any]:
    phases = [
        {
            "name": f"phase_{index}",
            "resolution": ("16x16", "24x24")[index % 2],
            "duration": {"frames": (5, 3)[index % 2]},
            "global_batch_size": (4, 8)[index % 2],
            "accumulation": (1, 2)[index % 2],
            "updates": UPDATES_PER_PHASE,
            "learning_rate": 1e-3,
        }
        for index in range(sweep["phases"])
    ]
    return {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused", "num_workers": 2 - sweep["ranks"]},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {"phases": phases},
        "engine": {
            "kind": "deepspeed" if sweep["ranks"] > 1 else "local",
            "deepspeed_config": str(Path(__file__).parents[2] / "ds_configs" / "zero1_fp32.json"),
        },
        "checkpoint": {"every_updates": 1000, **checkpoint},  # without it only requests and edges save
        "evaluation": {"max_clips": 4, "num_pictures": 0},
        "report": {"flush_updates": 1},
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _last_update(folder: Path) -> int:
    from aiprod_ds.metrics.jsonl import read_metrics

    return max(
        (update for update, row in read_metrics(folder / "metrics.jsonl") if "loss/total" in row), default=0
    )


def _await(condition: Callable[[], bool], *, poll_seconds: float = 0.002) -> None:
    deadline = time.monotonic() + 180.0  # a launcher starts in ten seconds where nothing else runs
    while not condition():
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(poll_seconds)


def _result(folder: Path) -> dict[str, Any]:
    from aiprod_ds.testing.runs import repeatable_rows

    digest = json.loads((folder / "report.json").read_text())["final_state_sha256"]
    return {"sha256": digest, "rows": repeatable_rows(folder)}


if __name__ == "__main__":
    # a rank of DeepSpeed's launcher
    sys.exit(_train(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])))
