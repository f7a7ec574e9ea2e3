"""The diffusion trainer on two ranks: full and LoRA resume bit for bit at every ZeRO stage; noise belongs to
samples, not ranks.

A tiny LTX-2 of video and sound trains through two phases with an average of its weights and an adaptive clip,
both of which travel in the checkpoint. One rank with the whole batch is the oracle of two ranks with half of
it each. Without the exhaustive tests each stage trains in one mode, ZeRO-3 in both, and is resumed from one
point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.testing.runs import alike_on_ranks, record_of, series, train_and_resume
from aiprod_ds.trainers.diffusion import DiffusionTrainer

MODES = ("full", "lora")
CASES = tuple((f"zero{stage}_fp32", mode) for stage in range(4) for mode in MODES)
WITH_DROPOUT = (
    "zero2_fp32",
    "lora",
)  # its masks belong to ranks, so it has no oracle; a resumed run repeats them
EDGE, LAST = 3, 6  # with a checkpoint every 2 updates they stand at 2, 3 (edge), 4 and 6 (end)
RESUMES = {"middle": 2, "edge": EDGE}
FEW = {
    ("zero0_fp32", "lora"): "middle",
    ("zero1_fp32", "full"): "edge",
    WITH_DROPOUT: "edge",
    ("zero3_fp32", "full"): "middle",
    ("zero3_fp32", "lora"): "edge",
}
RESUMED = [
    pytest.param(
        case, mode, resumed, marks=() if FEW.get((case, mode)) == resumed else pytest.mark.exhaustive
    )
    for case, mode in CASES
    for resumed in RESUMES
]
COMPARED = [
    pytest.param(*case, marks=() if case in FEW else pytest.mark.exhaustive)
    for case in CASES
    if case != WITH_DROPOUT
]

# The oracle is the local engine with the whole batch on one process. Ranks and flattened partitions add in
# another order, and Adam turns rounding of tiny gradients into steps of the learning rate's size.
RELATIVE_TOLERANCE = 1e-5

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(
    points_to_resume: Callable[..., dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder, resumed = tmp_path_factory.mktemp("ranks"), points_to_resume("case", "mode")
    compared = points_to_resume("case", "mode", point="metric")
    points = {case: resumed.get(case, []) for case in (resumed | compared)}
    return alike_on_ranks(run_every_case, ranks=2, folder=folder, points=points)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return alike_on_ranks(run_locally, ranks=1, folder=tmp_path_factory.mktemp("local"))


@pytest.mark.parametrize(("case", "mode", "resumed"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[str, Any], case: str, mode: str, resumed: str
) -> None:
    whole, again = runs[f"{case}_{mode}"]["whole"], runs[f"{case}_{mode}"][resumed]
    assert whole["updates"] == [EDGE, LAST - EDGE]
    assert len(set(series(whole, "loss/total"))) == LAST, "otherwise the comparison shows nothing"
    assert again["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert again["sha256"] == whole["sha256"], "parameters and optimizer state"
    assert again["rows"] == whole["rows"], "metrics.jsonl without measured times"


@pytest.mark.parametrize(("case", "mode"), COMPARED)
@pytest.mark.parametrize(
    "metric", ["loss/total", "loss/video", "loss/audio", "loss/video_s3", "gradient/norm", "evaluation/loss"]
)
def test_two_ranks_compute_what_one_rank_of_the_whole_batch_computes(
    runs: dict[str, Any], local: dict[str, Any], case: str, mode: str, metric: str
) -> None:
    oracle, found = series(local[mode], metric), series(runs[f"{case}_{mode}"]["whole"], metric)
    assert oracle, "otherwise the comparison shows nothing"
    assert found == pytest.approx(oracle, rel=RELATIVE_TOLERANCE, abs=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_clip_follows_the_norms_and_training_moves_the_held_out_loss(
    local: dict[str, Any], mode: str
) -> None:
    limits = series(local[mode], "gradient/clip_norm")
    assert len(set(limits)) == len(limits) == LAST
    held_out = series(local[mode], "evaluation/loss")
    assert len(held_out) == 3
    assert len(set(held_out)) == 3


# Below runs on the ranks.


def run_every_case(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by case of `points` the uninterrupted run and its copies resumed there."""
    return {
        f"{case}_{mode}": train_and_resume(
            partial(_train, case, mode),
            Path(folder) / f"{case}_{mode}",
            {point: RESUMES[point] for point in points[f"{case}_{mode}"]},
        )
        for case, mode in CASES
        if f"{case}_{mode}" in points
    }


def run_locally(folder: str) -> dict[str, Any]:
    """Returns the runs of the local engine by mode."""
    return {mode: _train("zero0_fp32", mode, Path(folder) / mode, kind="local") for mode in MODES}


def _train(case: str, mode: str, folder: Path, *, kind: str = "deepspeed") -> dict[str, Any]:
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = {"dataset": _clips(6, seed=0), "validation": _clips(3, seed=1)}
    summary = DiffusionTrainer(_config(case, mode, folder, kind), **clips).train(resume="auto")
    return record_of(summary, folder)


def _clips(count: int, *, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {
            "latents": normal(4, 2, 2, 2),
            "audio_latents": normal(2, 5, 4),
            "prompt_embeds": normal(3, 16),
            "prompt_attention_mask": torch.tensor([True, True, False]),
        }
        for _ in range(count)
    ]


def _config(case: str, mode: str, folder: Path, kind: str) -> DiffusionTrainerConfig:
    shared = {
        "resolution": "64x64",
        "duration": {"frames": 9},
        "updates": EDGE,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
    }
    dropout = 0.1 if (case, mode) == WITH_DROPOUT and kind == "deepspeed" else 0.0
    late = {"accumulation": 2, "loss": {"audio_weight": 0.5}, "activation_checkpointing": True}
    return DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {
                "source": "LTX2VideoTransformer3DModel",
                "config": {**LTX2.tiny_config(), "num_layers": 1},
            },
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 32,
                "temporal_stride": 8,
            },
            "audio_vae": {"source": "AutoencoderKLLTX2Audio"},
            "training_mode": mode,
            **({"lora": {"rank": 4, "dropout": dropout}} if mode == "lora" else {}),
            "data": {"train": "given_in_code", "num_workers": 0},
            "loss": {"first_frame_probability": 0.3},
            "ema": {"half_life_samples": 8},
            "optimizer": {
                "gradient_clip_norm": 1e6,
                "adaptive_clip": {"warmup_updates": 1, "smoothing": 0.5, "deviations": 0.5},
            },
            "curriculum": {
                "phases": [
                    {"name": "early", "warmup_updates": 1, **shared},
                    {"name": "late", **late, **shared},
                ],
            },
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 2},
            "evaluation": {"max_clips": 3, "noise_levels": [0.25, 0.75], "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
