"""Runs with a discriminator: stopping and resuming repeats an uninterrupted run bit for bit for both engines,
at every ZeRO stage, and every stage computes what the plain PyTorch engine computes.

Two phases, of which the second has other clips, another batch and accumulation; the discriminator starts in
the middle of the first, alone, and the model feels it from the edge on. LeCAM's means, R1's interval and the
start itself must come out of the checkpoint for the rest to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.state import tensors_sha256
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.snapshot import KINDS
from aiprod_ds.testing.runs import alike_on_ranks, record_of, series, train_and_resume
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

CASES = ("zero0_fp32", "zero1_fp32", "zero2_bf16", "zero3_fp32", "zero3_bf16")
ALWAYS = "zero2_bf16"
EDGE, LAST = 3, 6
RESUMES = {"started_alone": 2, "edge": EDGE, "against_the_model": 4}
RESUMED = [
    pytest.param(case, point, marks=() if case == ALWAYS else pytest.mark.exhaustive)
    for case in CASES
    for point in RESUMES
    if case != ALWAYS or point != "edge"
]
FP32 = [pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES if case.endswith("fp32")]
_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(
    points_to_resume: Callable[..., dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    points = points_to_resume("case", point="point")
    return alike_on_ranks(run_cases, ranks=2, folder=tmp_path_factory.mktemp("two"), points=points)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    return alike_on_ranks(run_local, ranks=1, folder=folder)


@pytest.mark.parametrize(("case", "point"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[str, Any], case: str, point: str
) -> None:
    whole, again = runs[case]["whole"], runs[case][point]
    assert again["resumed_from"] == [f"update_{RESUMES[point]:06d}"]
    assert again["sha256"] == whole["sha256"], "of the model"
    assert again["discriminator"] == whole["discriminator"], "weights, moments, running means and start"
    assert again["rows"] == whole["rows"]


def test_in_the_plain_engine_too(local: dict[str, Any]) -> None:
    whole, again = local["whole"], local["started_alone"]
    assert again["sha256"] == whole["sha256"]
    assert again["discriminator"] == whole["discriminator"]
    assert again["rows"] == whole["rows"]


def test_the_discriminator_starts_alone_and_goes_on_over_the_change_of_phase(local: dict[str, Any]) -> None:
    whole = local["whole"]
    assert len(series(whole, "loss/total")) == LAST
    assert len(series(whole, "loss/discriminator")) == LAST - 1
    assert len(series(whole, "loss/adversarial")) == LAST - EDGE
    assert len(series(whole, "loss/r1")) == 2, "of the five those with an even count of updates before"
    assert len(set(series(whole, "discriminator/adaptive_weight"))) == LAST - EDGE


@pytest.mark.parametrize("case", FP32)
@pytest.mark.parametrize("metric", ["loss/total", "loss/discriminator", "discriminator/gradient_norm"])
def test_every_stage_computes_what_the_local_engine_computes(
    runs: dict[str, Any], local: dict[str, Any], case: str, metric: str
) -> None:
    """Two ranks add in another order, and Adam turns rounding of tiny gradients into steps of the learning
    rate's size, on two sides that look at each other. Measured: 2e-5."""
    oracle = series(local["whole"], metric)
    assert series(runs[case]["whole"], metric) == pytest.approx(oracle, rel=2e-3)


# Below runs on the ranks.


def run_cases(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, resumed in points.items():
        train = partial(_train, case, "deepspeed")
        results[case] = train_and_resume(
            train, Path(folder) / case, {point: RESUMES[point] for point in resumed}
        )
    return results


def run_local(folder: str) -> dict[str, Any]:
    train = partial(_train, "zero0_fp32", "local")
    return train_and_resume(train, Path(folder) / "local", {"started_alone": RESUMES["started_alone"]})


def _train(case: str, kind: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyVideoVAE()
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = {
        "dataset": SyntheticVideoDataset(10, 5, 16, 16),
        "validation": SyntheticVideoDataset(1, 5, 16, 16, seed=1),
    }
    summary = VideoVAETrainer(_config(case, kind, folder), model=model, **clips).train(resume="auto")
    record = record_of(summary, folder)
    return {
        **record,
        "discriminator": _discriminator(folder / "checkpoints" / f"update_{LAST:06d}" / "engine"),
    }


def _discriminator(folder: Path) -> str:
    """Returns one hash of all that a checkpoint holds of it; it must be everything that the model's reader
    leaves out."""
    dist.barrier()
    with ShardReader(folder) as model, ShardReader(folder, of_companion=True) as beside:
        assert not any("network" in name for name in model.names("master"))
        found = [
            (f"{kind}/{name}", beside.whole(kind, name)) for kind in KINDS for name in beside.names(kind)
        ]
        names = {name for name, _ in found}
        assert {"buffer/started_at", "buffer/mean_logits", "buffer/num_means"} <= names
        assert sum(name.startswith("exp_avg_sq/") for name in names) == len(beside.names("master")) > 0
    return tensors_sha256(found)


def _config(case: str, kind: str, folder: Path) -> VAETrainerConfig:
    phase = {"updates": 3, "learning_rate": 3e-3, "resolution": "16x16"}
    # Not one frame: in bf16 on a CPU torch 2.14.1 convolves it with memory that nobody has written.
    short = {"name": "short", "duration": {"frames": 3}, "global_batch_size": 2, **phase}
    long = {
        "name": "long",
        "duration": {"frames": 5},
        "global_batch_size": 4,
        "accumulation": 2,
        "loss": {"feature_matching_weight": 0.5},
        **phase,
    }
    small = {"channels": 4, "layers": 2}
    adversarial = {
        "start_update": 1,
        "warmup_updates": 2,
        "ramp_updates": 2,
        "lecam_weight": 0.1,
        "r1_weight": 1.0,
        "r1_every_updates": 2,
        "patch_3d": small,
        "frame_2d": small,
    }
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {
                "perceptual_weight": 0.0,
                "kl_weight": 1e-3,
                "adversarial_weight": 0.5,
                "adversarial": adversarial,
            },
            "curriculum": {"phases": [short, long]},
            "ema": {"half_life_samples": 20},
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 2},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
        }
    )
