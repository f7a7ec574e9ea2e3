"""A run of two ranks of which one flips a bit: it ends with its exit code and saves nothing of that, and the
same command goes on and ends like the run in which no bit flipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.cli import DIVERGED, DONE, main
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.engine import dist
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import without_plots
from aiprod_ds.testing.tiny import tiny_ltx_vae
from aiprod_ds.train.replicas.check import ReplicaCheck
from aiprod_ds.train.replicas.verdict import Divergence
from aiprod_ds.train.state import TrainState

# The last save before the flip, the update after which a bit flips, and the next save, which finds it.
SAVED, FLIPS_AT, FOUND_AT, UPDATES = 6, 7, 9, 12
NAME = "vae.decoder.conv_out.conv.weight"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank has to tell of the run that diverged, of that which went on from it, and of one that
    never did."""
    folder = tmp_path_factory.mktemp("diverged")
    runs = {"diverged": ("run", FLIPS_AT), "resumed": ("run", None), "whole": ("whole", None)}
    return {
        case: run_on_ranks(train, arguments={"folder": str(folder / name), "flips_at": flips_at})
        for case, (name, flips_at) in runs.items()
    }


def test_the_run_ends_with_its_code_and_names_rank_tensor_and_checkpoint(
    outcomes: dict[str, list[Any]],
) -> None:
    for rank in outcomes["diverged"]:
        assert rank["code"] == DIVERGED
    report = outcomes["diverged"][0]["report"]
    assert report["status"] == "failed"
    assert f"update {FOUND_AT}: all ranks must hold the same bits" in report["error"]
    assert "rank 0 on" in report["error"]
    assert "rank 1 on" in report["error"]
    assert f"in weight {NAME}" in report["error"]
    assert f"checkpoint update_{SAVED:06d}" in report["error"]


def test_nothing_of_it_is_saved(outcomes: dict[str, list[Any]]) -> None:
    assert outcomes["diverged"][0]["checkpoints"] == [SAVED, SAVED // 2]


def test_the_same_command_goes_on_and_ends_like_the_run_without_a_flip(
    outcomes: dict[str, list[Any]],
) -> None:
    assert [rank["code"] for rank in outcomes["resumed"]] == [DONE, DONE]
    resumed, whole = outcomes["resumed"][0]["report"], outcomes["whole"][0]["report"]
    assert resumed["resumed_from"] == [f"update_{SAVED:06d}"]
    assert resumed["final_state_sha256"] == whole["final_state_sha256"]
    assert (resumed["updates"], whole["updates"]) == (UPDATES, UPDATES)


# Below runs on the ranks.


def train(folder: str, flips_at: int | None) -> dict[str, Any]:
    run = Path(folder)
    config = run.parent / f"{run.name}.yaml"
    if dist.is_main() and not config.exists():
        _write_config(config, run)
    dist.barrier()
    # The group of the ranks that were called outlives the command.
    with without_plots(), _flipping(flips_at), patch.object(dist, "shutdown", lambda: None):
        code = main(["train", str(config)])
    found: dict[str, Any] = {"code": code}
    if dist.is_main():
        found["report"] = json.loads((run / "report.json").read_text())
        names = CheckpointStore(run / "checkpoints").names()
        found["checkpoints"] = [int(name.removeprefix("update_")) for name in names]
    return found


@contextmanager
def _flipping(flips_at: int | None) -> Iterator[None]:
    """Flips a bit of a weight of rank 1 after so many updates."""
    begin, look, trained, updates = ReplicaCheck.begin, ReplicaCheck.look, [], 0

    def noted(check: ReplicaCheck, state: TrainState) -> None:
        trained.append(state)
        begin(check, state)

    def flipped(check: ReplicaCheck) -> Divergence | None:
        nonlocal updates
        updates += 1
        if updates == flips_at and dist.rank() == 1:
            (weight,) = [
                replica.tensor
                for replica in trained[-1].engine.replicas()
                if [(replica.kind, part.name) for part in replica.slices] == [("weight", NAME)]
            ]
            weight.data.view(torch.int32).view(-1)[-1] ^= 1 << 9
        return look(check)

    with patch.object(ReplicaCheck, "begin", noted), patch.object(ReplicaCheck, "look", flipped):
        yield


def _write_config(path: Path, run: Path) -> None:
    clips = path.parent / "clips"
    if not clips.exists():  # runs are compared, so they have the same files
        write_synthetic_clips(clips, num_clips=6, frames=9, height=32, width=32)
    phase = {"name": "only", "resolution": "32x32", "duration": {"frames": 9}, "learning_rate": 1e-3}
    values = {
        "trainer": "video_vae",
        "output_dir": str(run),
        "model": {"source": "AutoencoderKLLTXVideo", "config": tiny_ltx_vae()},
        "data": {"train": str(clips), "validation": str(clips), "num_workers": 0, "duplicates": "allow"},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**phase, "updates": UPDATES, "global_batch_size": 2}]},
        "engine": {"deepspeed_config": {"zero_optimization": {"stage": 0}}},
        "checkpoint": {"every_updates": SAVED // 2},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
    }
    path.write_text(yaml.safe_dump(values))
