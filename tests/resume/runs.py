"""Whole training runs that a rank makes for the tests of this folder: a tiny video VAE through two phases, then resumed copies.

`test_resume.py` and `test_equivalence.py` read what `run_every_case` measured; one launch per world size makes all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.report.jsonl import read_metrics
from aiprod_ds.train.video_vae import VideoVAETrainer

CASES = tuple(f"zero{stage}_{precision}" for precision in ("fp32", "bf16") for stage in range(4))
EDGE, LAST = 4, 8  # checkpoints stand at 3, 4 (edge), 6 and 8 (end)
RESUMES = {"middle_of_the_first_phase": 3, "edge": EDGE, "middle_of_the_last_phase": 6}

_DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
_MEASURED_TIME = ("time/", "throughput/", "memory/")


def run_every_case(folder: str) -> dict[str, Any]:
    """Returns by case the uninterrupted run and its resumed copies; on one rank also the local engine's run."""
    results: dict[str, Any] = {case: _run_and_resume(case, Path(folder)) for case in CASES}
    if dist.world_size() == 1:
        results["local"] = {"whole": _train("zero0_fp32", Path(folder) / "local", kind="local")}
    return results


def _run_and_resume(case: str, folder: Path) -> dict[str, Any]:
    whole = folder / f"{case}_{dist.world_size()}"
    results = {"whole": _train(case, whole)}
    for name, update in RESUMES.items():
        copy = whole.with_name(f"{whole.name}_{name}")
        if dist.is_main():
            _copy_as_if_stopped_at(update, whole, copy)
        dist.barrier()
        results[name] = _train(case, copy)
    return results


def _copy_as_if_stopped_at(update: int, whole: Path, copy: Path) -> None:
    """Keeps metrics.jsonl whole: a killed run has written rows beyond its last checkpoint."""
    shutil.copytree(whole, copy)
    (copy / "report.json").unlink()
    for checkpoint in (copy / "checkpoints").glob("update_*"):
        if int(checkpoint.name.removeprefix("update_")) > update:
            shutil.rmtree(checkpoint)


def _train(case: str, folder: Path, *, kind: str = "deepspeed") -> dict[str, Any]:
    config = _config(case, folder, kind)
    torch.manual_seed(0)
    model = TinyVAE()
    torch.manual_seed(hash(folder.name) % 1000)  # a resumed process stands elsewhere in torch's own stream
    clips = {"dataset": SyntheticVideoDataset(10, 9, 24, 24), "validation": SyntheticVideoDataset(3, 9, 24, 24, seed=1)}
    summary = VideoVAETrainer(config, model=model, **clips).train(resume="auto")
    dist.barrier()  # the main rank writes after the others have their summary
    rows = [[update, _repeatable(metrics)] for update, metrics in read_metrics(folder / "metrics.jsonl")]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("update_*"))
    return {
        "sha256": summary.final_state_sha256,
        "rows": rows,
        "checkpoints": checkpoints,
        "resumed_from": list(summary.resumed_from),
        "metrics": dict(summary.metrics),
        "updates": [phase.updates for phase in summary.phases],
        "layout": [summary.engine, summary.world_size, summary.zero_stage, summary.precision],
    }


def _repeatable(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(_MEASURED_TIME)}


def _config(case: str, folder: Path, kind: str) -> VAETrainerConfig:
    phase = {"updates": 4, "learning_rate": 3e-3, "warmup_updates": 1}
    low = {"name": "low", "resolution": "16x16", "duration": {"frames": 5}, "global_batch_size": 4, **phase}
    high = {"name": "high", "resolution": "24x24", "duration": {"frames": 9}, "global_batch_size": 8, "accumulation": 2, **phase}
    return VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "tests.TinyVAE", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3, "haar_weight": 0.1},
            "curriculum": {"phases": [low, high]},
            "engine": {"kind": kind, "deepspeed_config": str(_DS_CONFIGS / f"{case}.json")},
            "checkpoint": {"every_updates": 3},
            "evaluation": {"max_clips": 3, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )


class TinyVAE(nn.Module):
    """Strides 4 in space and 2 in time; a posterior, so that noise is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(3, 8, 3, stride=(1, 2, 2), padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.moments = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.grow = nn.ConvTranspose3d(4, 8, 3, stride=2, padding=1, output_padding=(0, 1, 1))
        self.leave = nn.ConvTranspose3d(8, 3, (3, 4, 4), stride=(1, 2, 2), padding=1)

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.silu(self.norm(self.enter(video_BCTHW)))
        mean, logvar = self.moments(hidden).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.leave(nn.functional.silu(self.grow(latent)))
        return decoded
