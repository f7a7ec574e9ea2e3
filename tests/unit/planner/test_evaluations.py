"""What evaluations cost by counted passes; the oracle is arithmetic that stands beside each number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiprod_ds.cli import main
from aiprod_ds.config.deepspeed import read_settings
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.errors import PlanError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.planning.previews import require_fitting_previews
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

PHASE = {"resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-3}
TEXT = {"source": "T5EncoderModel", "config": {"d_model": 16}}


def _video(*, world_size: int = 1, **sections: Any) -> Any:
    values = {
        "output_dir": "unused",
        "model": {"source": "given_in_code"},
        "data": {"train": "unused"},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {
            "phases": [{**PHASE, "name": "a", "updates": 1000, "global_batch_size": 16}],
        },
        "engine": {"kind": "deepspeed", "deepspeed_config": {}},
        **sections,
    }
    trainer = VideoVAETrainer(VAETrainerConfig.model_validate(values), model=TinyVideoVAE())
    return trainer.evaluation_cost(trainer.plan(world_size=world_size))


def _diffusion(**sections: Any) -> DiffusionTrainer:
    values = {
        "output_dir": "unused",
        "model": {"source": LTXVideo.transformer_class, "config": LTXVideo.tiny_config()},
        "vae": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused"},
        "curriculum": {
            "phases": [{**PHASE, "name": "a", "updates": 1000, "global_batch_size": 16}],
        },
        "evaluation": {"max_clips": 8, "num_pictures": 2},
        "engine": {"deepspeed_config": {}},
        **sections,
    }
    return DiffusionTrainer(DiffusionTrainerConfig.model_validate(values))


def test_the_worked_number() -> None:
    """1,000 x 16 clips are 3 x 16,000 passes; 9 times inside (not at 1,000, the end), before and after."""
    cost = _video(evaluation={"every_updates": 100})
    assert (cost.evaluations, cost.passes) == (11, 11 * 16)
    assert cost.share == pytest.approx(176 / (48_000 + 176))
    assert cost.warning is None


def test_without_an_interval_only_the_ends_count() -> None:
    assert _video().evaluations == 2


def test_an_interval_of_samples_counts_clips() -> None:
    assert _video(evaluation={"every_samples": 4000}).evaluations == 2 + 4


def test_ranks_wait_for_those_that_have_a_clip_more() -> None:
    """6 clips on 4 ranks are two turns of 4."""
    assert _video(world_size=4, evaluation={"max_clips": 6}).passes == 2 * 8


def test_smaller_phases_and_recomputation_weigh_as_they_are() -> None:
    """Phase a: 100 x 4 clips of a quarter of the pixels, 3 passes: 300; b: 10 x 4 clips, 4 passes: 160."""
    phases = [
        {**PHASE, "name": "a", "resolution": "8x8", "updates": 100, "global_batch_size": 4},
        {
            **PHASE,
            "name": "b",
            "updates": 10,
            "global_batch_size": 4,
            "activation_checkpointing": True,
        },
    ]
    cost = _video(curriculum={"phases": phases}, evaluation={"max_clips": 2, "every_updates": 50})
    assert cost.evaluations == 1 + 2 + 1  # at 50; 100 is the end of a
    assert cost.share == pytest.approx(8 / (300 + 160 + 8))


def test_above_five_percent_it_warns() -> None:
    cost = _video(evaluation={"every_updates": 2})
    assert cost.share > 0.05
    assert cost.warning is not None
    assert "Raise evaluation.every_updates, or lower evaluation.max_clips." in cost.warning


@pytest.mark.parametrize(
    ("interval", "advice"),
    [({"every_samples": 2}, "Raise evaluation.every_samples, or lower"), ({"max_clips": 10_000}, "Lower")],
)
def test_the_advice_names_the_intervals_that_are_set(interval: dict[str, int], advice: str) -> None:
    warning = _video(evaluation=interval).warning
    assert warning is not None
    assert f"by counted passes. {advice} evaluation.max_clips." in warning


def test_previews_count_every_forward_of_every_clip() -> None:
    """2 held-out prompts and 2 own, one of 4 times the pixels: 7 clips of 10 x 2 forwards, 4 + 1 + 1 times;
    measures: 8 clips at 4 levels, 2 times."""
    trainer = _diffusion(
        preview={
            "num_forwards": 10,
            "every_updates": 200,
            "prompts": ["x", {"prompt": "y", "resolution": "32x32"}],
            "text": TEXT,
        }
    )
    cost = trainer.evaluation_cost(trainer.plan())
    assert (cost.evaluations, cost.previews) == (2, 6)
    assert cost.passes == pytest.approx(6 * 7 * 20 + 2 * 8 * 4)
    plain = _diffusion(preview={"guidance_scale": 1.0, "num_forwards": 10})
    assert plain.evaluation_cost(plain.plan()).passes == 2 * 2 * 10 + 2 * 8 * 4


def test_a_preview_larger_than_memory_is_refused_with_its_place() -> None:
    large = {"prompt": "y", "resolution": "4096x4096", "duration": {"frames": 401}}
    trainer = _diffusion(preview={"prompts": ["x", large], "text": TEXT})
    settings, plan = read_settings(trainer.config, source="x"), trainer.plan()
    message = r"preview\.prompts\[1\]: must fit v100-32gb beside training, 34\.\d GB, got at least \d+"
    with pytest.raises(PlanError, match=message):
        require_fitting_previews(trainer, plan, settings, MACHINES["v100-32gb"])
    small = _diffusion(preview={"prompts": [{**large, "resolution": "64x64"}], "text": TEXT})
    require_fitting_previews(small, small.plan(), settings, MACHINES["v100-32gb"])


@pytest.mark.slow
def test_plan_and_check_tell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    config = "configs/video_vae/tiny.yaml"
    assert main(["plan", config]) == 0
    assert "evaluations: " in capsys.readouterr().out
    assert main(["check", config, "--set", "evaluation.every_updates=1"]) == 0
    assert "warning: evaluation: takes about" in capsys.readouterr().err
    assert main(["check", config, "--set", "evaluation.every_updates=0"]) == 2
    assert "evaluation.every_updates: " in capsys.readouterr().err
