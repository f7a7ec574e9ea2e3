# ruff: noqa: E501  messages stand on one line, as users see them
"""Rules of the audio trainer's configuration, each with one that passes and one that fails with its message."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.fingerprint import to_yaml
from aiprod_ds.errors import ConfigError
from aiprod_ds.strict_yaml import read_yaml

SECONDS = {"duration": {"seconds": 1.5}}


def values(*phases: dict[str, Any], **sections: Any) -> dict[str, Any]:
    full = [
        {"name": f"p{n}", "global_batch_size": 4, "updates": 10, "learning_rate": 1e-3, **p}
        for n, p in enumerate(phases)
    ]
    return {
        "output_dir": "o",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": full},
        **sections,
    }


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        AudioVAETrainerConfig.model_validate(given)
    return [problem.removeprefix("AudioVAETrainerConfig: ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    "given",
    [
        values(SECONDS),
        values({"duration": {"frames": 65_536}}),
        values({"buckets": [{**SECONDS, "share": 0.5}, {"duration": {"seconds": 3.0}, "share": 0.5}]}),
        values({**SECONDS, "loss": {"mel_weight": 1.0, "kl_weight": 0.0}}),
    ],
)
def test_phases_of_sound_have_a_length_and_no_picture(given: dict[str, Any]) -> None:
    config = AudioVAETrainerConfig.model_validate(given)
    assert (config.trainer, config.clip_rate_hz(), config.random_flip()) == ("audio_vae", 44_100.0, False)
    assert set(config.loss_weights()) == {"waveform_weight", "spectral_weight", "kl_weight", "mel_weight"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (values({**SECONDS, "resolution": "64x64"}), "curriculum.phases[0].resolution: has no effect for sound, got 64x64. Remove it."),
        (values(SECONDS, {"buckets": [{**SECONDS, "resolution": "64x32"}]}), "curriculum.phases[1].buckets[0].resolution: has no effect for sound, got 64x32. Remove it."),
        (values({"duration": {"seconds": 1.0, "frame_rate_hz": 24.0}}), "curriculum.phases[0].duration.frame_rate_hz: has no effect for sound, got 24. Remove it; data.sample_rate_hz is the rate."),
        (values({**SECONDS, "augment": {"random_flip": True}}), "curriculum.phases[0].augment.random_flip: has no effect for sound, got a value. Remove it."),
        (values(SECONDS, model={"source": "M", "spatial_stride": 8}), "model.spatial_stride: has no effect for sound, got 8. Remove it."),
        (values({**SECONDS, "loss": {"perceptual_weight": 1.0}}), "curriculum.phases[0].loss.perceptual_weight: is not a weight of the loss section, got 1.0. "),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(given: dict[str, Any], message: str) -> None:
    assert any(line.startswith(message) for line in problems(given))


def test_the_resolved_configuration_loads_equal() -> None:
    config = AudioVAETrainerConfig.model_validate(values(SECONDS))
    assert AudioVAETrainerConfig.model_validate(read_yaml(to_yaml(config).encode(), "resolved")) == config
