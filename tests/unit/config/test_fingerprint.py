"""Fingerprints: what must change them, what must not, and that they are the same on every machine."""

from typing import Any

import pytest

from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.video_vae import VAETrainerConfig

PHASE = {
    "resolution": "64x64",
    "duration": {"frames": 9},
    "global_batch_size": 4,
    "updates": 10,
    "learning_rate": 1e-3,
}
VALUES: dict[str, Any] = {
    "output_dir": "out",
    "model": {"source": "M"},
    "data": {"train": "samples"},
    "curriculum": {"phases": [{"name": "a", **PHASE}, {"name": "b", **PHASE}]},
}


def config(path: str | None = None, value: Any = None) -> VAETrainerConfig:
    """The configuration with `value` at the dotted `path`."""
    values = {key: dict(section) if isinstance(section, dict) else section for key, section in VALUES.items()}
    if path is not None:
        *sections, key = path.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return VAETrainerConfig.model_validate(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("output_dir", "elsewhere"),
        ("report.flush_updates", 3),
        ("checkpoint.every_updates", 3),
        ("evaluation.max_clips", 3),
        ("evaluation.every_updates", 3),
        ("evaluation.every_samples", 3),
        ("evaluation.keep_media", 3),
        ("data.num_workers", 7),
        ("engine.kind", "local"),
        ("engine.deepspeed_config", "ds_configs/zero3_bf16.json"),
        ("curriculum.phases", [{"name": "c", **PHASE}]),
        ("seed", 0),
    ],
)
def test_what_does_not_change_the_weights_leaves_the_fingerprint(path: str, value: Any) -> None:
    assert config_fingerprint(config(path, value)) == config_fingerprint(config())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("model.source", "N"),
        ("data.train", "other"),
        ("data.random_flip", False),
        ("loss.kl_weight", 1e-3),
        ("optimizer.weight_decay", 0.5),
        ("curriculum.frames_policy", "strict"),
        ("curriculum.adapter", {"moments": "reset"}),
    ],
)
def test_what_changes_the_weights_changes_the_fingerprint(path: str, value: Any) -> None:
    assert config_fingerprint(config(path, value)) != config_fingerprint(config())


def test_phases_are_hashed_one_by_one() -> None:
    before = phase_fingerprints(config())
    after = phase_fingerprints(
        config("curriculum.phases", [{"name": "a", **PHASE}, {"name": "b", **PHASE, "updates": 11}])
    )
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert len(before[0]) == 64


def test_default_and_stated_default_are_the_same_phase() -> None:
    stated = [{"name": "a", **PHASE, "schedule": "cosine"}, {"name": "b", **PHASE, "warmup_updates": 0}]
    assert phase_fingerprints(config("curriculum.phases", stated)) == phase_fingerprints(config())
