"""Runs that go wrong on two ranks: they go back and end like one that never applied what was wrong, also
where what is trained changes on the way, on another number of ranks, and when they are killed.

Losses are multiplied by NaN at some positions of the data, on one rank alone: the others learn of it as of
any other gradient that is not finite. The oracle does not look for spikes: there these updates are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import alike_on_ranks, record_of, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train import run as run_module
from aiprod_ds.train.spikes.rollbacks import read_rollbacks
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.diffusion_unit import DiffusionUnit
from aiprod_ds.trainers.video_vae import VideoVAETrainer, VideoVAEUnit

CASES = [
    "zero1_fp32",
    *(
        pytest.param(case, marks=pytest.mark.exhaustive)
        for case in ("zero0_fp32", "zero2_fp32", "zero3_fp32", "zero1_bf16", "zero2_bf16", "zero3_bf16")
    ),
]
WINDOW = range(4, 7)
UPDATES = 8
_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


class PowerCutError(RuntimeError):
    """Stands for whatever ends all ranks."""


@pytest.fixture(scope="module", params=CASES)
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    found = alike_on_ranks(run_case, ranks=2, folder=folder, case=request.param)
    arguments = {"folder": str(folder), "case": request.param}
    return {**found, "on_one_rank": run_on_ranks(go_on, ranks=1, arguments=arguments)[0]}


@pytest.mark.parametrize("trainer", ["vae", "lora_to_full"])
def test_it_ends_like_a_run_that_never_applied_them(records: dict[str, Any], trainer: str) -> None:
    oracle, whole = records[trainer]["oracle"], records[trainer]["whole"]
    assert oracle["rollbacks"] == []
    assert len(whole["rollbacks"]) == 1
    assert whole["sha256"] == oracle["sha256"], "parameters and optimizer state"
    assert whole["rows"] == oracle["rows"]


@pytest.mark.parametrize("trainer", ["vae", "lora_to_full"])
def test_one_that_is_killed_on_its_way_back_ends_the_same(records: dict[str, Any], trainer: str) -> None:
    killed, whole = records[trainer]["killed"], records[trainer]["whole"]
    assert killed["rollbacks"] == whole["rollbacks"]
    assert killed["sha256"] == whole["sha256"]
    assert killed["rows"] == whole["rows"]


def test_another_number_of_ranks_leaves_the_same_out(records: dict[str, Any]) -> None:
    found = records["on_one_rank"]
    assert found["rollbacks"] == [[0, WINDOW[0], WINDOW[-1]]]
    assert found["updates"] == [UPDATES]
    assert found["skipped"] == len(WINDOW)


# Below runs on the ranks.


def run_case(folder: str, case: str) -> dict[str, Any]:
    """Returns the records of both trainers, and leaves a run that was cut on its way back for one rank."""
    found = {}
    for trainer in ("vae", "lora_to_full"):
        found[trainer] = {
            "oracle": _train(trainer, case, Path(folder) / f"{trainer}_oracle", mode="off"),
            "whole": _train(trainer, case, Path(folder) / f"{trainer}_whole"),
        }
        _cut(trainer, case, Path(folder) / f"{trainer}_killed")
        found[trainer]["killed"] = _train(trainer, case, Path(folder) / f"{trainer}_killed")
    _cut("vae", case, Path(folder) / "vae_on_one_rank")
    return found


def go_on(folder: str, case: str) -> dict[str, Any]:
    """Goes on with what was cut."""
    return _train("vae", case, Path(folder) / "vae_on_one_rank")


def _cut(trainer: str, case: str, folder: Path) -> None:
    """Trains until the decision stands and the checkpoint is about to be read."""
    with patch.object(run_module, "read_engine", side_effect=PowerCutError), pytest.raises(PowerCutError):
        _train(trainer, case, folder)
    dist.barrier()


@contextmanager
def _going_wrong() -> Iterator[None]:
    """Of the last phase the updates of `WINDOW`, or where a phase has no more than two, its first three."""
    with _wrong(VideoVAEUnit, 0, WINDOW), _wrong(DiffusionUnit, 1, range(3)):
        yield


@contextmanager
def _wrong(unit: type, index: int, positions: range) -> Iterator[None]:
    real = unit.loss  # type: ignore[attr-defined]

    def loss(self: Any, engine: Any, batch: Any, phase: Any) -> Any:
        terms = real(self, engine, batch, phase)
        is_wrong = phase.index == index and batch.position in positions
        if is_wrong and engine.rank == engine.world_size - 1:
            return replace(terms, total=terms.total * math.nan)
        return terms

    with patch.object(unit, "loss", loss):
        yield


def _train(trainer: str, case: str, folder: Path, *, mode: str = "roll_back") -> dict[str, Any]:
    with without_plots(), _going_wrong():
        make = _vae if trainer == "vae" else _diffusion
        summary = make(case, folder, mode).train(resume="auto")
    record = record_of(summary, folder)
    rows = [
        [update, {name: value for name, value in row.items() if name != "clock/rollbacks"}]
        for update, row in record["rows"]
    ]
    decided = dist.from_main(lambda: [list(entry.window) for entry in read_rollbacks(folder).decided])
    return {**record, "rows": rows, "rollbacks": decided, "skipped": summary.skipped_updates}


def _vae(case: str, folder: Path, mode: str) -> VideoVAETrainer:
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 3},
        "global_batch_size": 4,
        "updates": UPDATES,
        "learning_rate": 3e-3,
    }
    values = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "ema": {"half_life_samples": 8},
        "curriculum": {"phases": [phase]},
        "engine": {"deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
        "checkpoint": {"every_updates": 2, "asynchronous": True},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        "report": {"flush_updates": 3},
        "spikes": {"mode": mode},
    }
    torch.manual_seed(0)
    model = TinyVideoVAE()
    clips = {
        "dataset": SyntheticVideoDataset(10, 5, 24, 24),
        "validation": SyntheticVideoDataset(2, 5, 24, 24, seed=1),
    }
    return VideoVAETrainer(VAETrainerConfig.model_validate(values), model=model, **clips)


def _diffusion(case: str, folder: Path, mode: str) -> DiffusionTrainer:
    shared = {"resolution": "64x64", "duration": {"frames": 9}, "learning_rate": 1e-3, "global_batch_size": 4}
    adapters = {"training_mode": "lora", "lora": {"rank": 4}}
    phases = [
        {"name": "adapters", "updates": 2, **shared, **adapters},
        {"name": "full", "updates": 3, **shared},
    ]
    values = {
        "output_dir": str(folder),
        "model": {
            "source": "LTXVideoTransformer3DModel",
            "config": {**LTXVideo.tiny_config(), "num_layers": 1},
        },
        "vae": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "spatial_stride": 32, "temporal_stride": 8},
        "data": {"train": "given_in_code", "num_workers": 0},
        "curriculum": {"phases": phases},
        "engine": {"deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
        "checkpoint": {"every_updates": 1},
        "evaluation": {"max_clips": 2, "noise_levels": [0.5], "num_pictures": 0},
        "spikes": {"mode": mode},
    }
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 2, 2, 2), "prompt_embeds": (3, 16)}
    clips: list[dict[str, Tensor]] = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(9)
    ]
    config = DiffusionTrainerConfig.model_validate(values)
    return DiffusionTrainer(config, dataset=clips[:6], validation=clips[6:])
