"""A disk that takes nothing of what the main rank writes: no other rank waits for it, and all end alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.testing.dist import run_on_ranks

pytestmark = pytest.mark.dist


def _train(folder: str, rule: str, fails: list[str]) -> dict[str, Any]:
    """Trains two updates; on the main rank every write of some files fails."""
    import torch

    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.data.synthetic import SyntheticVideoDataset
    from aiprod_ds.engine import dist
    from aiprod_ds.errors import AiprodError
    from aiprod_ds.testing.disks.faults import BadDisk
    from aiprod_ds.testing.runs import without_plots
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    class Failing(BadDisk):
        def meet(self, name: str, path: object) -> None:
            # Once the run has begun: at the start files are written beside their names.
            self.at = 0 if any(f"{path}/".find(f"/{word}/") >= 0 for word in fails) else None
            super().meet(name, path)

    phase = {
        "name": "only",
        "updates": 4,
        "global_batch_size": 2,
        "resolution": "16x16",
        "duration": {"frames": 5},
        "learning_rate": 1e-2,
    }
    values: dict[str, Any] = {
        "output_dir": folder,
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {"phases": [phase]},
        "engine": {"deepspeed_config": {"zero_optimization": {"stage": 1}}, "flat_parameters": "off"},
        "checkpoint": {"every_updates": 2},
        "evaluation": {"max_clips": 2, "num_pictures": 1},
        "report": {"flush_updates": 1, "on_full_disk": rule},
    }
    torch.manual_seed(0)
    clips = [SyntheticVideoDataset(num_clips=2, frames=5, height=16, width=16, seed=seed) for seed in (0, 1)]
    trainer = VideoVAETrainer(
        VAETrainerConfig.model_validate(values), model=TinyVideoVAE(), dataset=clips[0], validation=clips[1]
    )
    disk = Failing(Path(folder), count=1_000_000)
    try:
        if dist.is_main():
            with without_plots(), disk.watched():
                summary = trainer.train()
        else:
            with without_plots():
                summary = trainer.train()
    except AiprodError as error:
        return {"error": type(error).__name__, "message": str(error)[:60]}
    return {"sha256": summary.final_state_sha256, "error": ""}


CASES: dict[str, tuple[str, list[str], str]] = {
    "goes on": ("go_on", ["metrics.jsonl", "samples", "evaluations.jsonl"], ""),
    "stops": ("stop", ["metrics.jsonl"], "DiskError"),
    "no export": ("go_on", ["export"], "DiskError"),
}


def _train_all(folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (rule, fails, _) in CASES.items():
        found[name] = _train(f"{folder}/{name}", rule, fails)
    return found


def test_all_ranks_end_alike(tmp_path: Path) -> None:
    first, second = run_on_ranks(
        _train_all, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=300
    )
    assert first == second
    assert {name: found["error"] for name, found in first.items()} == {
        name: error for name, (_, _, error) in CASES.items()
    }
