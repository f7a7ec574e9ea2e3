"""Resume at five points around every kind of phase change, bit for bit, on two ranks under ZeRO 0 to 3.

The curriculum ends phases by updates, by epochs and by a plateau, and changes at its edges everything that a
phase can change: shapes, buckets and their shares, batch and accumulation, learning rate and schedule, weight
decay, loss weights, moments (reset and decayed), mirroring and activation checkpointing. A checkpoint stands
at every update; each resume starts from one of them. Without the exhaustive tests a point is tried at one
stage: each point and each stage comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import record_of, series, train_and_resume
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

STAGES = (0, 1, 2, 3)
UPDATES = {
    "by_updates": 4,
    "by_epochs": 5,
    "by_plateau": 5,
    "last": 3,
}  # epochs: 2 passes; plateau: 1 warm-up + 1 + 3 patience
EDGES = {"updates": 4, "epochs": 9, "plateau": 14}  # updates of the run when the phase that ends so is over
POINTS = tuple((kind, edge + offset) for kind, edge in EDGES.items() for offset in (-2, -1, 0, 1, 2))
RESUMED = [
    pytest.param(
        stage,
        update,
        id=f"{kind}_at_{update}-zero{stage}",
        marks=() if number % len(STAGES) == stage else pytest.mark.exhaustive,
    )
    for number, (kind, update) in enumerate(POINTS)
    for stage in STAGES
]

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(
    points_to_resume: Callable[..., dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    points = points_to_resume("stage", point="update")
    arguments = {"folder": str(tmp_path_factory.mktemp("transitions")), "points": points}
    results = run_on_ranks(run_every_stage, ranks=2, arguments=arguments, timeout_seconds=600)
    assert results[0] == results[1], "both ranks report the run's own numbers"
    whole: dict[str, dict[str, Any]] = results[0]
    return whole


@pytest.mark.parametrize("stage", STAGES)
def test_every_phase_ends_as_configured(runs: dict[str, dict[str, Any]], stage: int) -> None:
    phases = runs[str(stage)]["whole"]["phases"]
    assert phases == [
        [name, UPDATES[name], reason] for name, reason in zip(UPDATES, (*EDGES, "updates"), strict=True)
    ]


@pytest.mark.parametrize(("stage", "update"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[str, dict[str, Any]], stage: int, update: int
) -> None:
    whole, again = runs[str(stage)]["whole"], runs[str(stage)][f"{update}"]
    assert again["resumed_from"] == [f"update_{update:06d}"]
    assert again["rows"] == whole["rows"]
    assert again["sha256"] == whole["sha256"]
    assert again["phases"] == whole["phases"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_goes_through_the_same_losses(runs: dict[str, dict[str, Any]], stage: int) -> None:
    """The oracle is stage 0; the others add in another order, which fp32 rounds."""
    first, other = (series(runs[str(number)]["whole"], "loss/total") for number in (0, stage))
    assert len(first) == sum(UPDATES.values())
    assert other == pytest.approx(first, rel=1e-5, abs=0)


# Below runs on the ranks.


def run_every_stage(folder: str, points: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Returns by stage the uninterrupted run and the resumed ones by the update they resumed at."""
    return {
        str(stage): train_and_resume(
            partial(_train, stage),
            Path(folder) / f"stage_{stage}",
            {str(update): update for update in points.get(str(stage), ())},
        )
        for stage in STAGES
    }


def _train(stage: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyVideoVAE()
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = {
        "dataset": SyntheticVideoDataset(10, 9, 24, 24),
        "validation": SyntheticVideoDataset(3, 9, 24, 24, seed=1),
    }
    summary = VideoVAETrainer(_config(stage, folder), model=model, **clips).train(resume="auto")
    return {
        **record_of(summary, folder),
        "phases": [[phase.name, phase.updates, phase.ended_by] for phase in summary.phases],
    }


def _config(stage: int, folder: Path) -> VAETrainerConfig:
    by_updates = {
        "name": "by_updates",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "global_batch_size": 4,
        "updates": UPDATES["by_updates"],
        "learning_rate": 3e-3,
        "warmup_updates": 1,
    }
    images_and_videos = [
        {"resolution": "16x24", "duration": {"frames": 1}, "global_batch_size": 4, "share": 0.5},
        {"resolution": "24x16", "duration": {"frames": 9}, "global_batch_size": 4, "share": 0.5},
    ]
    by_epochs = {
        "name": "by_epochs",
        "buckets": images_and_videos,
        "epochs": 2,
        "max_updates": 100,
        "learning_rate": 2e-3,
        "schedule": "linear",
        "moments": "reset",
        "augment": {"random_flip": False},
    }
    by_plateau = {
        "name": "by_plateau",
        "resolution": "24x24",
        "duration": {"frames": 9},
        "global_batch_size": 8,
        "accumulation": 2,
        "plateau": {"patience_updates": 3, "threshold": 0.9, "smoothing": 0.0},
        "max_updates": 50,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup_updates": 1,
        "moments": "decay",
        "moment_decay": 0.5,
        "weight_decay": 0.1,
        "loss": {"haar_weight": 0.5},
        "activation_checkpointing": True,
    }
    last = {
        "name": "last",
        "resolution": "16x24",
        "duration": {"frames": 9},
        "global_batch_size": 4,
        "updates": UPDATES["last"],
        "learning_rate": 1e-3,
    }
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3, "haar_weight": 0.1},
            "curriculum": {"phases": [by_updates, by_epochs, by_plateau, last]},
            "engine": {"deepspeed_config": str(_DS_CONFIGS / f"zero{stage}_fp32.json")},
            "checkpoint": {"every_updates": 1},
            "evaluation": {"max_clips": 2, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
