"""SIGKILL inside phase changes: whatever is killed when, the run goes on from before or after the change,
never from a mixture.

A process that has imported everything forks the ranks of each attempt, so that an attempt takes about
two seconds. The ranks are real processes with a gloo group of their own; they write real checkpoints and die
by a real SIGKILL at a random moment between the last update of a phase and the first of the next.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.testing.dist import run_forked

STAGES = (1, 3)
# Before and after the checkpoint of an edge, of one rank, the other and both: six kinds. With few kills each
# stage has four of them, both together all.
KINDS, FEW = 6, 4
KILLS = (FEW, pytest.param(24, marks=pytest.mark.exhaustive))
PHASES_PER_KILL, UPDATES_PER_PHASE = 4, 2  # a signal that comes too late uses a phase up and does not count
RANKS = 2
ATTEMPT_SECONDS = 120

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", params=KILLS, ids=lambda kills: f"{kills}_kills")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen, by stage."""
    kills = request.param
    arguments = {"folder": str(tmp_path_factory.mktemp("kills")), "kills": kills}
    seen: dict[str, Any] = run_forked(serve, arguments=arguments, timeout_seconds=500 + 30 * kills)
    return {"kills": kills, **seen}


@pytest.fixture(params=STAGES, ids=lambda stage: f"zero{stage}")
def outcome(outcomes: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = outcomes[str(request.param)]
    return {"wanted": outcomes["kills"], **found}


def test_every_kill_hit_a_phase_change(outcome: dict[str, Any]) -> None:
    assert len(outcome["kills"]) == outcome["wanted"]
    assert {kill["target"] for kill in outcome["kills"]} == {"rank 0", "rank 1", "all"}


def test_every_kill_left_a_whole_checkpoint_of_before_or_after(outcome: dict[str, Any]) -> None:
    before = sum(kill["newest"]["updates"] < kill["edge"] for kill in outcome["kills"])
    assert 0 < before < len(outcome["kills"]), "some die before the checkpoint of the edge and some after it"
    for kill in outcome["kills"]:
        edge = kill["edge"]
        clock = kill["newest"]
        assert clock["updates"] in (edge - 1, edge), f"{kill}: a checkpoint stands at every update"
        assert clock["phase"] == (clock["updates"] - 1) // UPDATES_PER_PHASE, (
            f"{kill}: saved before the phase moved on"
        )


def test_the_killed_run_ends_like_the_one_that_nobody_killed(outcome: dict[str, Any]) -> None:
    assert outcome["killed"]["sha256"] == outcome["whole"]["sha256"]
    assert outcome["killed"]["rows"] == outcome["whole"]["rows"]
    assert len(outcome["whole"]["rows"]) >= PHASES_PER_KILL * outcome["wanted"] * UPDATES_PER_PHASE


# Below runs in the server and in the ranks that it forks.


def serve(folder: str, kills: int) -> dict[str, Any]:
    """Forks a process for each stage; they work side by side. Returns what they saw, by stage."""
    from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

    processes = [
        fork_ranks(partial(_kill_again_and_again, Path(folder), stage, kills), ranks=1, is_launched=False)[0]
        for stage in STAGES
    ]
    assert wait_for_ranks(processes, timeout_seconds=600 + 30 * kills) == [0] * len(STAGES)
    return {str(stage): json.loads((Path(folder) / f"{stage}.json").read_text()) for stage in STAGES}


def _kill_again_and_again(folder: Path, stage: int, kills: int) -> int:
    """Trains a whole run, then one that dies `kills` times, and writes what was seen to `STAGE.json`."""
    from aiprod_ds.checkpoint.store import CheckpointStore
    from aiprod_ds.testing.forked import wait_for_ranks

    chance = random.Random(stage)
    whole, start = folder / f"{stage}_whole", partial(_start, stage=stage, phases=PHASES_PER_KILL * kills)
    assert wait_for_ranks(start(whole)) == [0] * RANKS, "the run that nobody kills"
    change_seconds = _longest_phase_change(whole)
    killed, seen, attempts = folder / f"{stage}_killed", [], 0
    first = STAGES.index(stage) * (KINDS - FEW)
    while len(seen) < kills:
        attempts += 1
        kind = first + len(seen)
        events = _events(killed)
        ranks = start(killed)
        edge = _await_phase_end(killed, events)
        span = 0.9 * change_seconds
        if (
            kind % 2
            # else nearly all signals would come before the checkpoint, which stands near the end of the
            # change
        ):
            _await(killed / "checkpoints" / f"update_{edge:06d}")
            span = 0.1 * change_seconds
        time.sleep(chance.uniform(0.0, span))
        target = ("rank 0", "rank 1", "all")[kind % 3]
        for rank in ranks if target == "all" else [ranks[int(target[-1])]]:
            os.kill(rank, signal.SIGKILL)
        codes = wait_for_ranks(ranks)
        assert any(code != 0 for code in codes), f"{target}: must have died, got exit codes {codes}"
        newest = CheckpointStore(killed / "checkpoints").newest()
        assert newest is not None
        clock = newest.state.clock
        if clock.updates <= edge:  # otherwise the next phase had begun when the signal came
            seen.append({"target": target, "edge": edge, "newest": clock.to_dict()})
    assert wait_for_ranks(start(killed)) == [0] * RANKS, "the last attempt"
    outcome = {
        "stage": stage,
        "attempts": attempts,
        "kills": seen,
        "whole": _result(whole),
        "killed": _result(killed),
    }
    (folder / f"{stage}.json").write_text(json.dumps(outcome))
    return 0


def _start(folder: Path, *, stage: int, phases: int) -> list[int]:
    from aiprod_ds.testing.forked import fork_ranks

    return fork_ranks(partial(_train, folder, stage, phases), ranks=RANKS)


def _train(folder: Path, stage: int, num_phases: int) -> int:
    import torch

    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.data.synthetic import SyntheticVideoDataset
    from aiprod_ds.engine import dist
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    with dist.process_group(timeout_seconds=60, lost_rank_seconds=None), without_plots():
        if dist.is_main():
            handler = logging.FileHandler(f"{folder}.log")
            logging.getLogger("aiprod_ds").addHandler(handler)
            logging.getLogger("aiprod_ds").setLevel(logging.INFO)
        torch.manual_seed(0)
        clips = {
            "dataset": SyntheticVideoDataset(6, 5, 24, 24),
            "validation": SyntheticVideoDataset(8, 5, 24, 24, seed=1),
        }
        config = VAETrainerConfig.model_validate(_config(folder, stage, num_phases))
        VideoVAETrainer(config, model=TinyVideoVAE(), **clips).train(resume="auto")
    return 0


def _config(folder: Path, stage: int, num_phases: int) -> dict[str, Any]:
    policies: tuple[dict[str, Any], ...] = (
        {},
        {"moments": "reset"},
        {"moments": "decay", "moment_decay": 0.5},
    )
    phases = [
        {
            "name": f"phase_{index}",
            "resolution": ("16x16", "24x24", "16x24")[index % 3],
            "duration": {"frames": (5, 3)[index % 2]},
            "global_batch_size": (4, 8)[index % 2],
            "accumulation": (1, 2)[index % 2],
            "updates": UPDATES_PER_PHASE,
            "learning_rate": 1e-3 * (1 + index % 4),
            "weight_decay": 0.01 * (index % 3),
            "activation_checkpointing": index % 4 == 1,
            **(policies[index % 3] if index else {}),
        }
        for index in range(num_phases)
    ]
    return {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {"phases": phases},
        "engine": {
            "deepspeed_config": str(Path(__file__).parents[2] / "ds_configs" / f"zero{stage}_fp32.json")
        },
        "checkpoint": {"every_updates": 1},
        "evaluation": {"max_clips": 8, "num_pictures": 0},  # the change lasts longer than a signal takes
        "report": {"flush_updates": 1},
    }


def _events(folder: Path) -> int:
    log = Path(f"{folder}.log")
    return log.read_text().count("phase_ends") if log.is_file() else 0


def _await_phase_end(folder: Path, before: int) -> int:
    """Returns the update at which a phase ended, as soon as one more has ended than `before`."""
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while _events(folder) <= before:
        assert not _is_completed(folder), "the run has ended before it was killed often enough"
        assert time.monotonic() < deadline, "no phase ended"
        time.sleep(0.002)
    line = next(
        line for line in reversed(Path(f"{folder}.log").read_text().splitlines()) if "phase_ends" in line
    )
    return int(line.split("update=")[1].split()[0])


def _is_completed(folder: Path) -> bool:
    """A rank that outlives the killed one leaves a report too, of a failed run."""
    report = folder / "report.json"
    try:
        return bool(json.loads(report.read_text())["status"] == "completed")
    except FileNotFoundError:
        return False


def _await(folder: Path) -> None:
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while not folder.is_dir():
        assert time.monotonic() < deadline, f"{folder} did not appear"
        time.sleep(0.001)


def _longest_phase_change(folder: Path) -> float:
    from aiprod_ds.metrics.jsonl import read_metrics

    name = "time/phase_change_seconds"
    return max(metrics[name] for _, metrics in read_metrics(folder / "metrics.jsonl") if name in metrics)


def _result(folder: Path) -> dict[str, Any]:
    from aiprod_ds.testing.runs import repeatable_rows

    digest = json.loads((folder / "report.json").read_text())["final_state_sha256"]
    return {"sha256": digest, "rows": repeatable_rows(folder)}
