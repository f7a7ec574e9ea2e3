"""Runs that do not come on: each kind is found, the ranks to blame are named, what can be saved is saved, and
the resumed run ends like the one that never hung.

A process that has imported everything forks the ranks. Stopped are real processes, and what blocks is a real
FIFO that nobody writes into.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from aiprod_ds.testing.dist import run_forked

HUNG, INTERRUPTED = 76, 75
HANG_SECONDS, NEVER_SECONDS = 3.0, 120.0
UPDATES, HANGS_AT = 150, 6
# What the promise allows beyond the limit, of which these runs need a part; a stopped rank is killed by the
# test.
WITHIN_SECONDS = 60.0
CASES: dict[str, dict[str, Any]] = {
    "whole": {"ranks": 1, "workers": 1, "hang_seconds": NEVER_SECONDS},
    "rank stopped": {"ranks": 2, "workers": 0, "stop": "rank"},
    "rank elsewhere": {"ranks": 2, "workers": 0, "sleep": True},
    "worker stopped": {"ranks": 1, "workers": 1, "stop": "worker"},
    "fifo": {"ranks": 1, "workers": 1, "fifo": True},
    "fifo, no worker": {"ranks": 1, "workers": 0, "fifo": True},
    "fifo, asked to stop": {"ranks": 1, "workers": 1, "fifo": True, "term": True, "hang_seconds": 24.0},
    "fifo of a rank, asked to stop": {
        "ranks": 2,
        "workers": 1,
        "fifo": True,
        "term": True,
        "hang_seconds": 12.0,
    },
    "disk": {"ranks": 1, "workers": 0, "disk": True, "hang_seconds": 0.8},
}
# Two halves whose time is spent on waiting, so they go side by side.
LANES = [
    [name for name, case in CASES.items() if bool(case.get("term")) is waits_longest]
    for waits_longest in (True, False)
]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {"folder": str(tmp_path_factory.mktemp("hangs"))}
    found: dict[str, Any] = run_forked(serve, arguments=arguments, timeout_seconds=400)
    return found


def test_a_stopped_rank_is_named_and_the_others_show_where_they_wait(outcomes: dict[str, Any]) -> None:
    found = outcomes["rank stopped"]
    assert found["codes"][0] == HUNG, found
    assert found["seconds"] < WITHIN_SECONDS
    assert "rank 1 does not answer: stopped, or gone" in found["verdict"]
    assert f"no progress for {HANG_SECONDS:.0f} s in train" in found["verdict"]
    assert list(found["stacks"]) == ["rank_0.txt"]
    assert "torch/distributed" in found["stacks"]["rank_0.txt"]


def test_a_rank_that_never_enters_a_collective_is_named(outcomes: dict[str, Any]) -> None:
    found = outcomes["rank elsewhere"]
    assert found["codes"] == [HUNG, HUNG], found
    assert found["seconds"] < WITHIN_SECONDS
    assert f"rank 1 on {os.uname().nodename} is at update {found['done']}, in train for" in found["verdict"]
    assert "in sleep_for_good" in found["verdict"]
    assert "the others wait for it" in found["verdict"]
    assert "rank 0" not in found["verdict"]
    assert "sleep_for_good" in found["stacks"]["rank_1.txt"]
    assert "sleep_for_good" not in found["stacks"]["rank_0.txt"]


@pytest.mark.parametrize("case", ["worker stopped", "fifo", "fifo, no worker"])
def test_data_that_do_not_come_end_the_run_saved(outcomes: dict[str, Any], case: str) -> None:
    found = outcomes[case]
    assert found["codes"] == [HUNG], found
    assert found["seconds"] < WITHIN_SECONDS
    assert found["saved"] == found["done"] >= HANGS_AT - 1
    assert found["status"] == "failed"
    assert "in data_wait" in found["error"]
    assert "Thread" in found["stacks"]["rank_0.txt"]
    if case == "fifo, no worker":
        assert "test_hangs.py" in found["error"], "where it blocks"
    assert found["left"] == [], "no worker outlives its run"


@pytest.mark.parametrize("case", ["worker stopped", "fifo", "fifo, no worker"])
def test_the_resumed_run_ends_like_the_one_that_never_hung(outcomes: dict[str, Any], case: str) -> None:
    assert outcomes[case]["resumed"] == outcomes["whole"]["resumed"]


def test_sigterm_with_blocked_data_saves_and_leaves(outcomes: dict[str, Any]) -> None:
    found = outcomes["fifo, asked to stop"]
    assert found["codes"] == [INTERRUPTED], found
    assert found["seconds"] < 25
    assert found["saved"] == found["done"]
    assert found["status"] == "interrupted"
    assert found["resumed"] == outcomes["whole"]["resumed"]


def test_sigterm_with_blocked_data_of_one_rank_of_two_leaves(outcomes: dict[str, Any]) -> None:
    found = outcomes["fifo of a rank, asked to stop"]
    assert found["codes"] == [HUNG, HUNG], found
    assert found["seconds"] < 25
    assert "asked to stop by SIGTERM while no data came" in found["verdict"]
    assert "in data_wait" in found["verdict"]


def test_a_disk_that_blocks_is_found(outcomes: dict[str, Any]) -> None:
    found = outcomes["disk"]
    assert found["codes"] == [HUNG], found
    assert found["seconds"] < WITHIN_SECONDS
    assert "in checkpoint" in found["verdict"]
    assert "fsync_that_blocks" in found["stacks"]["rank_0.txt"], "of the thread that writes"


# Below runs in the server and in the ranks that it forks.


class Clips(Dataset[torch.Tensor]):
    """Synthetic clips of which one blocks where a file says so: it opens a FIFO that nobody writes into."""

    def __init__(self, folder: Path, num_clips: int, *, seed: int = 0) -> None:
        from aiprod_ds.data.synthetic import SyntheticVideoDataset

        self._clips, self._folder = SyntheticVideoDataset(num_clips, 5, 16, 16, seed=seed), folder

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3 and (self._folder / "fifo").exists():
            with open(self._folder / "fifo") as fifo:  # noqa: PTH123  it shall be this line that blocks
                fifo.read()
        return self._clips[index]


def serve(folder: str) -> dict[str, Any]:
    from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

    root = Path(folder)
    lanes = [fork_ranks(partial(_lane, root, names), ranks=1, is_launched=False)[0] for names in LANES]
    assert wait_for_ranks(lanes, timeout_seconds=390) == [0] * len(LANES)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in CASES}


def _lane(root: Path, names: list[str]) -> int:
    for name in names:
        found = _case(root / str(list(CASES).index(name)), CASES[name])
        (root / f"{name}.json").write_text(json.dumps(found))
    return 0


def _case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    from aiprod_ds.checkpoint.store import CheckpointStore
    from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

    folder.mkdir()
    run, ranks = folder / "run", case["ranks"]
    processes = fork_ranks(partial(_train, folder, case), ranks=ranks, is_launched=ranks > 1)
    began = time.monotonic()
    children: list[int] = []
    if case is not CASES["whole"]:
        _await(lambda: _last_update(run) >= HANGS_AT - 1)
        children = [child for process in processes for child in _children(process)]
        if case.get("fifo"):
            os.mkfifo(folder / "fifo")
        if case.get("stop") == "rank":
            os.kill(processes[1], signal.SIGSTOP)
        if case.get("stop") == "worker":
            os.kill(children[0], signal.SIGSTOP)
        if case.get("term"):
            _await(lambda: _is_quiet(run, seconds=1.5))
            began = time.monotonic()
            for process in processes:
                os.kill(process, signal.SIGTERM)
        if case.get("sleep") or case.get("disk"):
            (folder / "now").touch()
    codes = wait_for_ranks(processes, survivor_seconds=5)
    newest = CheckpointStore(run / "checkpoints").newest()
    found = {
        "codes": codes,
        "seconds": time.monotonic() - began,
        "saved": None if newest is None else newest.state.clock.updates,
        "done": _last_update(run),
        "left": _left(children),
        "stacks": {path.name: path.read_text() for path in sorted(run.glob("hangs/*/rank_*.txt"))},
        "verdict": "".join(path.read_text() for path in run.glob("hangs/*/verdict.txt")),
    }
    report = run / "report.json"
    if report.exists():
        values = json.loads(report.read_text())
        found |= {"status": values["status"], "error": str(values.get("error"))}
    if ranks == 1 and "disk" not in case:
        (folder / "fifo").unlink(missing_ok=True)
        healthy = partial(_train, folder, {**case, "hang_seconds": NEVER_SECONDS})  # on a busy machine, too
        assert wait_for_ranks(fork_ranks(healthy, ranks=1, is_launched=False)) == [0], "the resumed run"
        found["resumed"] = json.loads(report.read_text())["final_state_sha256"]
    return found


def _train(folder: Path, case: dict[str, Any]) -> int:
    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.engine import dist
    from aiprod_ds.errors import HangError
    from aiprod_ds.report.summary import RunStatus
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    with without_plots(), dist.process_group(timeout_seconds=120):
        if dist.is_main():
            logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        torch.manual_seed(0)
        model = TinyVideoVAE()
        if case.get("sleep") and dist.rank() == 1:
            _inner(model).register_forward_pre_hook(partial(sleep_for_good, folder))
        if case.get("disk"):
            _block_disk(folder)
        config = VAETrainerConfig.model_validate(_config(folder / "run", case))
        clips = {"dataset": Clips(folder, 6), "validation": Clips(folder / "none", 2, seed=1)}
        try:
            summary = VideoVAETrainer(config, model=model, **clips).train(resume="auto")
        except HangError:
            return HUNG
    return 0 if summary.status is RunStatus.COMPLETED else INTERRUPTED


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a module that every loss calls."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.Conv3d))


def sleep_for_good(folder: Path, module: torch.nn.Module, _inputs: Any) -> None:
    if module.training and (folder / "now").exists():
        time.sleep(3600)


def _block_disk(folder: Path) -> None:
    fsync = os.fsync

    def fsync_that_blocks(descriptor: int) -> None:
        if (folder / "now").exists():
            time.sleep(3600)
        fsync(descriptor)

    os.fsync = fsync_that_blocks


def _config(run: Path, case: dict[str, Any]) -> dict[str, Any]:
    phase = {"name": "only", "resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-3}
    is_disk = case.get("disk", False)
    return {
        "output_dir": str(run),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused", "num_workers": case["workers"]},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {"phases": [{**phase, "global_batch_size": 2, "updates": UPDATES}]},
        "engine": {
            "kind": "deepspeed" if case["ranks"] > 1 else "local",
            "deepspeed_config": str(Path(__file__).parents[2] / "ds_configs" / "zero1_fp32.json"),
            "hang_seconds": case.get("hang_seconds", HANG_SECONDS),
        },
        "checkpoint": {"every_updates": 10 if is_disk else 1000},
        "evaluation": {"max_clips": 2, "num_pictures": 0},
        "report": {"flush_updates": 1},
    }


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def _left(children: list[int]) -> list[int]:
    """Returns who is still there after the seconds in which a worker finds out that its parent is gone."""
    deadline = time.monotonic() + 5.0
    while (left := [child for child in children if _is_there(child)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _is_quiet(run: Path, *, seconds: float) -> bool:
    return time.time() - (run / "metrics.jsonl").stat().st_mtime > seconds


def _last_update(run: Path) -> int:
    from aiprod_ds.metrics.jsonl import read_metrics

    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return max((update for update, row in rows if "loss/total" in row), default=0)


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.005)
