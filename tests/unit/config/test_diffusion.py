# ruff: noqa: E501  messages stand on one line, as users see them
"""Rules of the diffusion trainer's configuration, each with one that passes and one that fails with its message."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.fingerprint import to_yaml
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.strict_yaml import read_yaml

SHAPE = {"resolution": "64x64", "duration": {"frames": 9}}


def values(*phases: dict[str, Any], **sections: Any) -> dict[str, Any]:
    full = [
        {"name": f"p{n}", "global_batch_size": 4, "updates": 10, "learning_rate": 1e-3, **p}
        for n, p in enumerate(phases)
    ]
    return {
        "output_dir": "o",
        "model": {"source": "M"},
        "vae": {"source": "V"},
        "data": {"train": "s"},
        "curriculum": {"phases": full},
        **sections,
    }


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        DiffusionTrainerConfig.model_validate(given)
    return [problem.removeprefix("DiffusionTrainerConfig: ") for problem in caught.value.problems]


FULL, LORA = {**SHAPE, "training_mode": "full"}, {**SHAPE, "training_mode": "lora"}
SMALL = {**LORA, "lora": {"rank": 4}}


@pytest.mark.parametrize(
    ("given", "adapters"),
    [
        (values(SHAPE), [None]),
        (values({**SHAPE, "loss": {"audio_weight": 0.5}}), [None]),
        (values(SHAPE, training_mode="lora"), [LoraConfig()]),
        (values(SHAPE, training_mode="lora", lora={"rank": 4}), [LoraConfig(rank=4)]),
        (values(LORA, SHAPE), [LoraConfig(), None]),
        (values(SHAPE, FULL, SMALL, training_mode="lora"), [LoraConfig(), None, LoraConfig(rank=4)]),
        (values(LORA, {**FULL, "moments": "reset"}, lora={"rank": 4}), [LoraConfig(rank=4), None]),
        (values(LORA, {**LORA, "moments": "keep"}), [LoraConfig(), LoraConfig()]),
    ],
)
def test_modes_and_weights(given: dict[str, Any], adapters: list[LoraConfig | None]) -> None:
    config = DiffusionTrainerConfig.model_validate(given)
    assert (config.trainer, config.clip_rate_hz(), config.random_flip()) == ("diffusion", None, False)
    assert config.loss_weights() == {"video_weight": 1.0, "audio_weight": 0.25}
    assert [config.phase_adapters(phase) for phase in config.curriculum.phases] == adapters


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (values({"duration": {"frames": 9}}), "curriculum.phases[0].resolution: must be given for video, got nothing. Add `resolution:`."),
        (values(SHAPE, lora={"rank": 4}), "lora: has no effect unless a phase trains these adapters, got a value. Remove it or set training_mode: lora."),
        (values(SMALL, lora={"rank": 8}), "lora: has no effect unless a phase trains these adapters, got a value. Remove it or set training_mode: lora."),
        (values(SHAPE, model={"source": "M", "lora_init": {"path": "p"}}), "model.lora_init: has no effect unless the first phase trains adapters, got a value. Set training_mode: lora, or merge it with model.lora_checkpoint."),
        (values({**SHAPE, "lora": {}}), "curriculum.phases[0].lora: has no effect with training_mode: full, got a value. Remove it or set training_mode: lora."),
        (values(LORA, {**FULL, "moments": "keep"}), "curriculum.phases[1].moments: must be reset where other parameters are trained, got keep. Remove it: a new optimizer begins with the phase."),
        (values({**SHAPE, "augment": {"random_flip": True}}), "curriculum.phases[0].augment.random_flip: has no effect for latents, got a value. Remove it."),
        (values(SHAPE, model={"source": "M", "spatial_stride": 8}), "model.spatial_stride: has no effect for a transformer, got 8. Set it in the section vae."),
        (values(SHAPE, model={"source": "M", "temporal_stride": 8}), "model.temporal_stride: has no effect for a transformer, got 8. Set it in the section vae."),
        (values({**SHAPE, "loss": {"kl_weight": 1.0}}), "curriculum.phases[0].loss.kl_weight: is not a weight of the loss section, got 1.0. "),
    ],
)  # fmt: skip
def test_what_is_missing_or_has_no_effect_is_refused(given: dict[str, Any], message: str) -> None:
    assert any(line.startswith(message) for line in problems(given))


def test_everything_wrong_is_told_at_once() -> None:
    given = values({"duration": {"frames": 9}}, lora={"rank": 4}, model={"source": "M", "spatial_stride": 8})
    assert len(problems(given)) == 3


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_a_noise_level_out_of_range_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match="noise_levels"):
        DiffusionTrainerConfig.model_validate(values(SHAPE, evaluation={"noise_levels": [level]}))


def test_the_resolved_configuration_loads_equal() -> None:
    config = DiffusionTrainerConfig.model_validate(values(SHAPE, training_mode="lora"))
    assert DiffusionTrainerConfig.model_validate(read_yaml(to_yaml(config).encode(), "resolved")) == config
