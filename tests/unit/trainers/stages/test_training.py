"""Whole trainings on the local engine of what takes a path of its own: models without a posterior, tiles,
pictures beside clips, and layers that remember what they saw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.engine import dist
from aiprod_ds.errors import PlanError
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.models.video_vae import VideoVAE
from aiprod_ds.testing.runs import without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_allegro, tiny_cosmos
from aiprod_ds.trainers.stages.latent_facts import latent_facts
from aiprod_ds.trainers.video_vae import VideoVAETrainer

SIZE = 16
TINY = {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    yield
    dist.shutdown()


def _clips(count: int, frames: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(3, frames, SIZE, SIZE, generator=generator) * 2 - 1 for _ in range(count)]


def _trainer(folder: Path, model: dict[str, Any], phase: dict[str, Any], **loss: Any) -> VideoVAETrainer:
    shared = {"name": "only", "updates": 2, "learning_rate": 1e-3, "global_batch_size": 2}
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": model,
            "data": {"train": "given_in_code", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, **loss},
            "curriculum": {"phases": [{**shared, **phase}]},
            "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
            "report": {"flush_updates": 1},
        }
    )
    return VideoVAETrainer(config, dataset=_clips(4), validation=_clips(1))


def _rows(folder: Path) -> list[dict[str, float]]:
    return [row for _, row in read_metrics(folder / "metrics.jsonl") if "loss/total" in row]


@pytest.mark.parametrize(
    ("source", "settings", "frames", "has_posterior"),
    [
        ("AutoencoderKLCosmos", tiny_cosmos(), 3, False),
        pytest.param("AutoencoderKLAllegro", tiny_allegro(), 4, True, marks=pytest.mark.exhaustive),
    ],
)
def test_classes_of_diffusers_are_trained_measured_and_exported(
    tmp_path: Path, source: str, settings: dict[str, Any], frames: int, *, has_posterior: bool
) -> None:
    phase = {"resolution": f"{SIZE}x{SIZE}", "duration": {"frames": frames}}
    trainer = _trainer(tmp_path, {"source": source, "config": settings}, phase)
    with without_plots():
        summary = trainer.train()
    assert summary.updates == 2
    rows = _rows(tmp_path)
    assert all(("loss/kl" in row) == has_posterior for row in rows)
    assert all(("latent/collapsed_share" in row) == has_posterior for row in rows)
    assert {"psnr_db_before", "psnr_db_after"} <= set(summary.metrics)
    loaded = getattr(diffusers, source).from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        assert VideoVAE(loaded)(_clips(1, frames)[0][None])[0].shape == (1, 3, frames, SIZE, SIZE)


def test_pictures_and_clips_are_trained_together(tmp_path: Path) -> None:
    shapes = [
        {"resolution": f"{SIZE}x{SIZE}", "duration": {"frames": frames}, "share": 0.5} for frames in (5, 1)
    ]
    trainer = _trainer(
        tmp_path, TINY, {"buckets": shapes, "updates": 4}, frame_difference_weight=1.0, flicker_weight=1.0
    )
    with without_plots():
        trainer.train()
    changes = [row["loss/frame_difference"] for row in _rows(tmp_path)]
    assert sum(change == 0.0 for change in changes) == 2, "the updates of pictures"
    assert sum(change > 0.0 for change in changes) == 2


def test_problems_of_stages_are_found_in_the_plan(tmp_path: Path) -> None:
    phase = {"resolution": f"{SIZE}x{SIZE}", "duration": {"frames": 5}, "frozen": ["encoder"]}
    with pytest.raises(PlanError, match=r"curriculum\.phases\[0\]\.frozen\[0\]: must match a layer"):
        _trainer(tmp_path, TINY, phase).plan()


class _Remembering(TinyVideoVAE):
    """Has running statistics in its encoder and in its decoder, and dropout in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(nn.Sequential(nn.BatchNorm3d(8), nn.Dropout(0.5)))
        self.grow = nn.Sequential(self.grow, nn.BatchNorm3d(8))  # type: ignore[assignment]


def test_what_makes_latents_remembers_nothing_while_they_are_kept() -> None:
    module = VideoVAE(_Remembering()).train()
    clip = _clips(1, 5)[0][None]
    facts = latent_facts(module, clip.to("meta"))
    assert facts is not None
    module.freeze(facts.depend_on, latents_depend_on=facts.depend_on)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = (module(clip) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert not first[1].requires_grad
    assert first[0].requires_grad
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[0] for name in moved} == {"vae.grow.1"}
    module.freeze((), latents_depend_on=facts.depend_on)
    assert module(clip)[1].requires_grad
    assert module.vae.blocks[2].training
