"""A run that keeps an average of its weights and adapts its gradient clip: what is exported, evaluated and
repeated.

On the local engine; `Ema` and `AdaptiveClip` themselves have tests of their own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

BATCH = 4
HALF_LIFE = 4  # samples, so one batch halves what the average remembers
CLIP = {"warmup_updates": 1, "smoothing": 0.5, "deviations": 1.0}


def _trainer(folder: Path, *, updates: int, every: int = 100, **sections: Any) -> VideoVAETrainer:
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 3},
        "updates": updates,
        "learning_rate": 0.01,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**phase, "schedule": "constant", "global_batch_size": BATCH}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "checkpoint": {"every_updates": every},
        "evaluation": {"max_clips": 2, "num_pictures": 0},
        **sections,
    }
    torch.manual_seed(0)
    clips = [SyntheticVideoDataset(num_clips=6, frames=4, height=16, width=16, seed=seed) for seed in (0, 1)]
    return VideoVAETrainer(
        VAETrainerConfig.model_validate(values), model=TinyVideoVAE(), dataset=clips[0], validation=clips[1]
    )


def _exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "diffusion_pytorch_model.safetensors")


def _series(folder: Path, name: str) -> list[float]:
    return [metrics[name] for _, metrics in read_metrics(folder / "metrics.jsonl") if name in metrics]


def test_the_average_is_exported_and_measured_and_training_does_not_notice(tmp_path: Path) -> None:
    for updates in (1, 2):
        _trainer(tmp_path / f"plain_{updates}", updates=updates).train()
    averaged = {"half_life_samples": HALF_LIFE, "ramp": None}
    summary = _trainer(tmp_path / "averaged", updates=2, ema=averaged).train()

    torch.manual_seed(0)
    start, first, second = (
        TinyVideoVAE().state_dict(),
        _exported(tmp_path / "plain_1"),
        _exported(tmp_path / "plain_2"),
    )
    found = _exported(tmp_path / "averaged")
    for name, value in found.items():
        after_one = (start[name] + first[name]) / 2
        torch.testing.assert_close(
            value, (after_one + second[name]) / 2, rtol=1e-6, atol=1e-8
        )  # fp32 rounding of two lerps
    assert any(not torch.equal(value, second[name]) for name, value in found.items()), (
        "otherwise nothing was averaged"
    )

    assert _series(tmp_path / "averaged", "loss/total") == _series(tmp_path / "plain_2", "loss/total")
    assert (
        _series(tmp_path / "averaged", "evaluation/psnr_db")[0]
        == _series(tmp_path / "plain_2", "evaluation/psnr_db")[0]
    )
    assert (
        _series(tmp_path / "averaged", "evaluation/psnr_db")[1]
        != _series(tmp_path / "plain_2", "evaluation/psnr_db")[1]
    )
    plain = _trainer(tmp_path / "again", updates=2).train()
    assert summary.final_state_sha256 == plain.final_state_sha256


def test_a_resumed_run_repeats_average_and_clip(tmp_path: Path) -> None:
    sections = {"ema": {"half_life_samples": HALF_LIFE}, "optimizer": {"adaptive_clip": CLIP}}
    whole = _trainer(tmp_path / "whole", updates=5, every=3, **sections).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "update_000005")
    again = _trainer(tmp_path / "again", updates=5, every=3, **sections).train()
    assert again.resumed_from == ("update_000003",)
    assert again.final_state_sha256 == whole.final_state_sha256
    for name, value in _exported(tmp_path / "again").items():
        assert torch.equal(value, _exported(tmp_path / "whole")[name]), name
    assert _series(tmp_path / "again", "gradient/clip_norm") == _series(
        tmp_path / "whole", "gradient/clip_norm"
    )


def test_evaluating_a_checkpoint_measures_the_average(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, updates=2, ema={"half_life_samples": HALF_LIFE})
    trainer.train()
    found = _trainer(tmp_path, updates=2, ema={"half_life_samples": HALF_LIFE}).evaluate()
    assert found["psnr_db"] == _series(tmp_path, "evaluation/psnr_db")[-1]


def test_the_clip_follows_the_norms_below_the_fixed_one(tmp_path: Path) -> None:
    """Closed form: before update 2 only the first norm is known, with deviation 0; before update 3 the means
    of two."""
    _trainer(tmp_path, updates=3, optimizer={"adaptive_clip": CLIP, "gradient_clip_norm": 1e6}).train()
    norms, limits = _series(tmp_path, "gradient/norm"), _series(tmp_path, "gradient/clip_norm")
    mean = (0.5 * norms[0] + norms[1]) / 1.5
    deviation = ((0.5 * (norms[0] - mean) ** 2 + (norms[1] - mean) ** 2) / 1.5) ** 0.5
    assert limits == pytest.approx([1e6, norms[0], mean + deviation], rel=1e-9)
    _trainer(
        tmp_path / "fixed", updates=3, optimizer={"adaptive_clip": CLIP, "gradient_clip_norm": 1e-3}
    ).train()
    assert _series(tmp_path / "fixed", "gradient/clip_norm") == [1e-3] * 3
