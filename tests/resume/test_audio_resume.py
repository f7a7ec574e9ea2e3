"""The audio trainer on two ranks: every ZeRO stage resumes bit for bit and computes what the plain PyTorch
engine computes.

A tiny Oobleck, so with weight normalisation, trains through two phases: other length, batch and accumulation
in the second, which also recomputes activations. Copies of the run folder whose later checkpoints were taken
away then go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.testing.runs import record_of, series, train_and_resume
from aiprod_ds.testing.tiny import tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer

CASES = tuple(f"zero{stage}_fp32" for stage in range(4))
EDGE, LAST = 3, 6  # with a checkpoint every 2 updates they stand at 2, 3 (edge), 4 and 6 (end)
RESUMES = {"middle": 2, "edge": EDGE}
RESUMED = [
    # the others differ from these in the stage alone
    pytest.param(case, resumed, marks=() if (number + place) % len(RESUMES) == 0 else pytest.mark.exhaustive)
    for number, case in enumerate(CASES)
    for place, resumed in enumerate(RESUMES)
]
RATE_HZ = 8_000

# The oracle is the local engine with the whole batch on one process. Ranks and flattened partitions add in
# another order, and Adam turns rounding of tiny gradients into steps of the learning rate's size. Measured:
# 2.2e-7. That needs a smooth loss, hence log1p: the gradient of log(S + 1e-5) in silent bins makes 1e-7 into
# 1e-2 within six updates.
RELATIVE_TOLERANCE = 1e-5

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("case", "resumed"), RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[str, Any], case: str, resumed: str
) -> None:
    whole, again = runs[case]["whole"], runs[case][resumed]
    assert whole["updates"] == [EDGE, LAST - EDGE]
    assert len(set(series(whole, "loss/total"))) == LAST, "otherwise the comparison shows nothing"
    assert again["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert again["sha256"] == whole["sha256"], "parameters and optimizer state"
    assert again["rows"] == whole["rows"], "metrics.jsonl without measured times"
    assert again["statistics"] == whole["statistics"], "of the exported latents"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric", ["loss/total", "loss/kl", "gradient/norm", "evaluation/mel_distance"])
def test_every_stage_computes_what_the_local_engine_computes(
    runs: dict[str, Any], local: dict[str, Any], case: str, metric: str
) -> None:
    oracle = series(local, metric)
    assert len(oracle) == (3 if metric.startswith("evaluation/") else LAST)
    assert series(runs[case]["whole"], metric) == pytest.approx(oracle, rel=RELATIVE_TOLERANCE, abs=0)


# Below runs on the ranks.


def run_every_case(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by case the uninterrupted run and its copies resumed at `points`."""
    return {
        case: train_and_resume(
            partial(_train, case),
            Path(folder) / case,
            {point: RESUMES[point] for point in points.get(case, ())},
        )
        for case in CASES
    }


def run_locally(folder: str) -> dict[str, Any]:
    """Returns the run of the local engine."""
    return _train("zero0_fp32", Path(folder) / "local", kind="local")


def _train(case: str, folder: Path, *, kind: str = "deepspeed") -> dict[str, Any]:
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    clips = {"dataset": _sounds(6, seed=0), "validation": _sounds(3, seed=1)}
    summary = AudioVAETrainer(_config(case, folder, kind), **clips).train(resume="auto")
    return {
        **record_of(summary, folder),
        "statistics": (folder / "export" / "latent_statistics.json").read_text(encoding="utf-8"),
    }


def _sounds(count: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2_400, generator=generator) - 0.5 for _ in range(count)]


def _config(case: str, folder: Path, kind: str) -> AudioVAETrainerConfig:
    short = {"name": "short", "duration": {"frames": 512}, "global_batch_size": 4, "warmup_updates": 1}
    long = {
        "name": "long",
        "duration": {"seconds": 0.13},
        "global_batch_size": 4,
        "accumulation": 2,
        "loss": {"spectral_weight": 0.5},
    }
    shared = {"updates": EDGE, "learning_rate": 1e-3}
    oobleck = {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ}
    return AudioVAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "AutoencoderOobleck", "config": oobleck},
            "data": {"train": "given_in_code", "num_workers": 0, "sample_rate_hz": RATE_HZ, "channels": 1},
            "loss": {"waveform_weight": 1.0, "spectral": {"fft_sizes": [256, 64], "log": "log1p"}},
            "curriculum": {
                "phases": [{**short, **shared}, {**long, **shared, "activation_checkpointing": True}]
            },
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 2},
            "evaluation": {"max_clips": 3, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
