"""What stands against a discriminator is found when the plan is made: the rule, what was got and a fix."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.fingerprint import config_fingerprint
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

PHASE = {
    "resolution": "16x16",
    "duration": {"frames": 5},
    "global_batch_size": 2,
    "learning_rate": 1e-3,
    "updates": 4,
}
GOOD: dict[str, Any] = {"patch_3d": {"channels": 4, "layers": 2}}


def _config(adversarial: dict[str, Any] | None, *, weight: float = 0.5, **sections: Any) -> VAETrainerConfig:
    loss: dict[str, Any] = {"perceptual_weight": 0.0, "adversarial_weight": weight}
    if adversarial is not None:
        loss["adversarial"] = {**GOOD, **adversarial}
    values = {
        "output_dir": "unused",
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "unused", "num_workers": 0},
        "loss": loss,
        "curriculum": {"phases": [{"name": "one", **PHASE}, {"name": "two", **PHASE}]},
        "engine": {"kind": "local"},
    }
    return VAETrainerConfig.model_validate({**values, **sections})


def _plan(config: VAETrainerConfig) -> None:
    clips = {
        "dataset": SyntheticVideoDataset(2, 5, 16, 16),
        "validation": SyntheticVideoDataset(1, 5, 16, 16),
    }
    VideoVAETrainer(config, model=TinyVideoVAE(), **clips).plan()


def test_what_is_right_is_planned() -> None:
    _plan(_config({}))
    _plan(_config({"start_update": 7}))
    _plan(_config({"start_phase": "two", "warmup_updates": 3, "last_layer": "leave"}))


@pytest.mark.parametrize(
    ("adversarial", "words"),
    [
        ({"start_update": 8}, r"start_update: must be below the updates of the run \(8\), got 8"),
        ({"start_phase": "tow"}, "start_phase: must name a phase, got 'tow'. Did you mean 'two'"),
        ({"start_update": 6, "warmup_updates": 2}, "warmup_updates: must leave updates .* got 2 of the 2"),
        ({"start_phase": "two", "warmup_updates": 4}, "warmup_updates: must leave updates .* got 4 of the 4"),
        ({"last_layer": "leaf"}, "last_layer: must name .* got 'leaf'. The one that runs last is leave"),
        ({"last_layer": "blocks.0.norm"}, "last_layer: must name a convolution"),
        ({"patch_3d": {"layers": 5}}, "sides of at least 32 for loss.adversarial.patch_3d .* got 16x16"),
    ],
)
def test_what_cannot_be_trained_is_told(adversarial: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        _plan(_config(adversarial))


def test_weights_that_sum_to_nothing_after_the_start_are_told() -> None:
    with pytest.raises(PlanError, match=r"adversarial_weight: this or .* must exceed 0 .* got 0 in one, two"):
        _plan(_config({}, weight=0.0))
    early = [{"name": "one", **PHASE}, {"name": "two", **PHASE, "loss": {"adversarial_weight": 0.0}}]
    with pytest.raises(PlanError, match="got 0 in two"):
        _plan(_config({"start_update": 2, "warmup_updates": 2}, curriculum={"phases": early}))


def test_an_adaptive_weight_of_nothing_is_told() -> None:
    matching = {"perceptual_weight": 0.0, "feature_matching_weight": 1.0, "adversarial": GOOD}
    with pytest.raises(PlanError, match="adaptive: has no effect without adversarial_weight, got last_layer"):
        _plan(_config(None, weight=0.0, loss=matching))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"performance": {"graphs": "passes"}}, "performance.graphs: must be off or auto"),
        ({"engine": {"parallel": "auto"}}, "engine.parallel: must be configured with loss.adversarial"),
    ],
)
def test_what_does_not_go_with_a_second_engine_is_told(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        _plan(_config({}, **sections))


@pytest.mark.parametrize(
    ("adversarial", "words"),
    [
        ({"start_update": 1, "start_phase": "two"}, "start_update: has no effect beside start_phase"),
        ({"lecam_decay": 0.9}, "lecam_decay: has no effect without lecam_weight"),
        ({"r1_every_updates": 2}, "r1_every_updates: has no effect without r1_weight"),
        ({"adaptive": "output", "last_layer": "leave"}, "last_layer: has no effect without adaptive"),
        ({"adaptive": "off", "max_adaptive": 2.0}, "max_adaptive: has no effect without adaptive"),
        ({"patch_3d": None, "r1_weight": 1.0}, "patch_3d: this or frame_2d must be a discriminator"),
    ],
)
def test_the_section_alone_is_checked_where_it_is_read(adversarial: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _config(adversarial)


def test_weights_need_a_discriminator_in_the_section_and_in_phases() -> None:
    with pytest.raises(ConfigError, match=r"adversarial_weight: has no effect without adversarial, got 0\.5"):
        _config(None)
    phase = {"name": "one", **PHASE, "loss": {"feature_matching_weight": 1.0}}
    with pytest.raises(ConfigError, match="feature_matching_weight: is not a weight of the loss section"):
        _config(None, weight=0.0, curriculum={"phases": [phase]})


def test_a_run_without_one_has_the_fingerprint_that_it_had_before() -> None:
    assert config_fingerprint(_config(None, weight=0.0)) != config_fingerprint(_config({}))
    plain = _config(None, weight=0.0)
    assert not {"adversarial_weight", "feature_matching_weight"} & set(plain.loss_weights())


def _audio(adversarial: dict[str, Any], *, samples: int = 64) -> AudioVAETrainerConfig:
    phase = {
        "name": "one",
        "duration": {"frames": samples},
        "global_batch_size": 2,
        "learning_rate": 1e-3,
        "updates": 4,
    }
    return AudioVAETrainerConfig.model_validate(
        {
            "trainer": "audio_vae",
            "output_dir": "unused",
            "model": {"source": "AutoencoderOobleck", "config": tiny_oobleck()},
            "data": {"train": "unused", "sample_rate_hz": 44100, "channels": 2},
            "loss": {"adversarial_weight": 1.0, "adversarial": adversarial},
            "curriculum": {"phases": [phase]},
            "engine": {"kind": "local"},
        }
    )


@pytest.mark.slow  # builds Oobleck
def test_clips_of_sound_must_fill_windows_and_periods() -> None:
    too_long = {"stft": {"fft_sizes": [4096]}, "period": {"periods": [2, 3001]}}
    with pytest.raises(PlanError) as caught:
        AudioVAETrainer(_audio(too_long, samples=2048)).plan()
    text = str(caught.value)
    assert "duration: must give at least 4096 samples for loss.adversarial.stft.fft_sizes, got 2048" in text
    assert "duration: must give at least 3002 samples for loss.adversarial.period.periods, got 2048" in text
