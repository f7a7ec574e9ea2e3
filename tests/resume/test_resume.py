"""Whole training runs on one and two ranks: resuming repeats an uninterrupted run bit for bit, and every ZeRO
stage computes what the plain PyTorch engine computes.

One call per world size trains a tiny video VAE through two phases (other resolution, frames, batch and
accumulation in the second) for every settings file, then trains copies of the run folder whose later
checkpoints were taken away. Without the exhaustive tests every case is resumed from one point: each point
comes at each world size, and at each stage and precision.
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
from aiprod_ds.engine import dist
from aiprod_ds.testing.runs import alike_on_ranks, record_of, series, train_and_resume
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

WORLDS = (1, 2)
CASES = tuple(f"zero{stage}_{precision}" for precision in ("fp32", "bf16") for stage in range(4))
FP32_CASES = tuple(case for case in CASES if case.endswith("fp32"))
EDGE, LAST = 4, 8  # with a checkpoint every 3 updates they stand at 3, 4 (edge), 6 and 8 (end)
RESUMES = {"middle_of_the_first_phase": 3, "edge": EDGE, "middle_of_the_last_phase": 6}
RESUMED = [
    pytest.param(
        world,
        case,
        resumed,
        marks=() if (number + world + place) % len(RESUMES) == 0 else pytest.mark.exhaustive,
    )
    for world in WORLDS
    for number, case in enumerate(CASES)
    for place, resumed in enumerate(RESUMES)
]

# The oracle is the local engine with the whole batch on one process. Ranks and flattened partitions add in
# another order, and Adam turns rounding of tiny gradients into steps of the learning rate's size. Measured:
# 1e-7 on one rank, 3e-7 on two.
RELATIVE_TOLERANCE = 1e-5

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(
    points_to_resume: Callable[..., dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    found = {}
    for world in WORLDS:
        found[world] = alike_on_ranks(
            run_every_case,
            ranks=world,
            folder=tmp_path_factory.mktemp(f"world_{world}"),
            points=points_to_resume("case", world=world),
        )
    return found


@pytest.mark.parametrize(("world", "case", "resumed"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[int, dict[str, Any]], world: int, case: str, resumed: str
) -> None:
    whole, again = runs[world][case]["whole"], runs[world][case][resumed]
    assert again["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert again["sha256"] == whole["sha256"], "parameters and optimizer state"
    assert again["rows"] == whole["rows"], (
        "metrics.jsonl without measured times: losses, norms, rates, clock, held-out measures"
    )
    assert again["metrics"] == whole["metrics"]
    assert again["checkpoints"] == whole["checkpoints"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_the_uninterrupted_run_is_what_it_should_be(
    runs: dict[int, dict[str, Any]], world: int, case: str
) -> None:
    whole, (stage, precision) = runs[world][case]["whole"], case.removeprefix("zero").split("_")
    assert whole["layout"] == ["deepspeed", world, int(stage), precision]
    assert whole["resumed_from"] == []
    assert whole["updates"] == [EDGE, LAST - EDGE]
    assert whole["checkpoints"] == [f"update_{update:06d}" for update in (3, 4, 6, 8)]
    assert len(set(series(whole, "loss/total"))) == LAST, "otherwise the comparisons show nothing"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FP32_CASES)
@pytest.mark.parametrize("metric", ["loss/total", "loss/kl", "gradient/norm"])
def test_every_stage_computes_what_the_local_engine_computes(
    runs: dict[int, dict[str, Any]], world: int, case: str, metric: str
) -> None:
    oracle = series(runs[1]["local"]["whole"], metric)
    assert len(oracle) == LAST
    assert series(runs[world][case]["whole"], metric) == pytest.approx(oracle, rel=RELATIVE_TOLERANCE, abs=0)


# Below runs on the ranks.


def run_every_case(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by case the uninterrupted run and its copies resumed at `points`; on one rank also the local
    engine's run."""
    results: dict[str, Any] = {}
    for case in CASES:
        whole = Path(folder) / f"{case}_{dist.world_size()}"
        results[case] = train_and_resume(
            partial(_train, case), whole, {point: RESUMES[point] for point in points.get(case, ())}
        )
    if dist.world_size() == 1:
        results["local"] = {"whole": _train("zero0_fp32", Path(folder) / "local", kind="local")}
    return results


def _train(case: str, folder: Path, *, kind: str = "deepspeed") -> dict[str, Any]:
    config = _config(case, folder, kind)
    torch.manual_seed(0)
    model = TinyVideoVAE()
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = {
        "dataset": SyntheticVideoDataset(10, 9, 24, 24),
        "validation": SyntheticVideoDataset(3, 9, 24, 24, seed=1),
    }
    summary = VideoVAETrainer(config, model=model, **clips).train(resume="auto")
    return {
        **record_of(summary, folder),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").glob("update_*")),
        "metrics": dict(summary.metrics),
        "layout": [summary.engine, summary.world_size, summary.zero_stage, summary.precision],
    }


def _config(case: str, folder: Path, kind: str) -> VAETrainerConfig:
    phase = {"updates": 4, "learning_rate": 3e-3, "warmup_updates": 1}
    low = {"name": "low", "resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 4, **phase}
    high = {
        "name": "high",
        "resolution": "24x24",
        "duration": {"frames": 9},
        "global_batch_size": 8,
        "accumulation": 2,
        **phase,
    }
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3, "haar_weight": 0.1},
            "curriculum": {"phases": [low, high]},
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 3},
            "evaluation": {"max_clips": 3, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
