r"""What does the trainer cost over a bare DeepSpeed loop, and does its memory stay flat?

Both sides train the same tiny LTX-Video VAE on the same synthetic clips in one process, one after the other,
several times in turn. The bare side is the shortest honest loop: L1 + KL, no metrics, no files. Run on an
idle machine:

    python benchmarks/trainer_overhead.py --updates 60 --runs 3 --memory-updates 500 \
        --output benchmarks/results/NAME.json

It does not show: several ranks, real decoding, GPUs, or memory that grows early and then stops (the long run
comes last, in a process that has trained before).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from result_file import figure, write_result

from aiprod_ds.config.load import load_config
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

_TINY = Path(__file__).parents[1] / "configs" / "video_vae" / "tiny.yaml"
_SETTINGS = {"zero_optimization": {"stage": 1}}
_BATCH, _FRAMES, _SIZE = 2, 9, 64
_WARM_UP = 5


def main() -> None:
    """Measures both sides in turn and writes one result file."""
    parser = argparse.ArgumentParser(description="Trainer against a bare DeepSpeed loop.")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory-updates", type=int, default=500)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    clips = SyntheticVideoDataset(8, _FRAMES, _SIZE, _SIZE, 0)
    os.environ.setdefault(
        "LOCAL_RANK", "0"
    )  # the bare deepspeed.initialize asks for it; one process has no launcher to set it
    with dist.process_group():
        bare: list[float] = []
        trainer: list[float] = []
        for _ in range(arguments.runs):
            bare.append(_bare_seconds(clips, arguments.updates))
            trainer.append(_trainer_rows(clips, arguments.updates)[0])
        _, memory = _trainer_rows(clips, arguments.memory_updates)
    write_result(arguments.output, "trainer_overhead", _rows(bare, trainer, memory))


def _bare_seconds(clips: SyntheticVideoDataset, updates: int) -> float:
    """Returns seconds per update of the bare loop, warm-up excluded."""
    import deepspeed

    module = VideoVAE(build_model(_config(Path("unused"), updates).model, seed=0))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    settings = {
        **_SETTINGS,
        "train_micro_batch_size_per_gpu": _BATCH,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    began = 0.0
    for update in range(_WARM_UP + updates):
        if update == _WARM_UP:
            began = time.perf_counter()
        video_BCTHW = torch.stack([clips[(update * _BATCH + place) % len(clips)] for place in range(_BATCH)])
        reconstruction_BCTHW, mean, logvar = engine(video_BCTHW, [2 * update, 2 * update + 1])
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / video_BCTHW.numel()
        engine.backward((reconstruction_BCTHW - video_BCTHW).abs().mean() + 1e-6 * kl)
        engine.step()
    seconds = (time.perf_counter() - began) / updates
    engine.destroy()
    return seconds


def _trainer_rows(clips: SyntheticVideoDataset, updates: int) -> tuple[float, list[float]]:
    """Returns the trainer's seconds per update (everything between the first and the last, waiting included)
    and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder) / "run", updates)
        summary = VideoVAETrainer(config, dataset=clips, validation=clips).train(resume="never")
        rows = [row for _, row in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss/total" in row]
    first = sum(row["time/update_seconds"] for row in rows[:_WARM_UP])
    total = summary.time_seconds["train"] + summary.time_seconds["data_wait"]
    return (total - first) / (len(rows) - _WARM_UP), [row["memory/rss_bytes"] for row in rows]


def _config(folder: Path, updates: int) -> VAETrainerConfig:
    phase = {
        "name": "only",
        "resolution": f"{_SIZE}x{_SIZE}",
        "duration": {"frames": _FRAMES},
        "global_batch_size": _BATCH,
        "updates": _WARM_UP + updates,
        "learning_rate": 1e-3,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": load_config(_TINY).model,
        "data": {"train": "unused", "num_workers": 0},
        "curriculum": {"phases": [phase]},
        "loss": {"perceptual_weight": 0.0},
        "engine": {"deepspeed_config": _SETTINGS},
        "checkpoint": {"every_updates": 10_000},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
    }
    return VAETrainerConfig.model_validate(values)


def _rows(bare: list[float], trainer: list[float], memory: list[float]) -> list[dict[str, Any]]:
    overhead = 100 * (statistics.median(trainer) / statistics.median(bare) - 1)
    growth = (statistics.median(memory[-50:]) - statistics.median(memory[50:100])) / 2**20
    return [
        figure("bare DeepSpeed loop", "seconds per update", "s", bare),
        figure("trainer", "seconds per update", "s", trainer),
        figure("trainer over bare loop", "overhead", "%", [overhead], goal=5.0),
        figure(f"trainer, {len(memory) - _WARM_UP} updates", "growth of resident memory", "MiB", [growth]),
    ]


if __name__ == "__main__":
    main()
