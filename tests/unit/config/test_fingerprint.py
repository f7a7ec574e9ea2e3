"""Fingerprints: what must change them, what must not, and that they are the same on every machine."""

from typing import Any

import pytest

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.run import RunConfig
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
        ("spikes.max_rollbacks", 9),
        ("data.num_workers", 7),
        ("data.duplicates", "allow"),
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
        ("data.hdr", "leave_out"),
        ("data.alpha_background", [255, 255, 255]),
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


@pytest.mark.parametrize(
    ("schema", "values", "phase", "expected"),
    [
        (
            VAETrainerConfig,
            {"model": {"source": "aiprod_ds.testing.tiny:TinyVideoVAE"}, "data": {"train": "clips"}},
            {"resolution": "64x64", "duration": {"frames": 9}},
            "434e8baac2b5ced659cfc42624b53ec7ec0d69b0bb51e4333231006b1d8d08d4",
        ),
        (
            AudioVAETrainerConfig,
            {"model": {"source": "AutoencoderOobleck"}, "data": {"train": "clips", "sample_rate_hz": 16000}},
            {"duration": {"seconds": 1.0}},
            "5d444736cc033f1477237c33b29d3eea5cb3055f9c7c21b577169824e8c42052",
        ),
        (
            DiffusionTrainerConfig,
            {
                "model": {"source": "LTXVideoTransformer3DModel"},
                "data": {"train": "latents"},
                "vae": {"source": "AutoencoderKLLTXVideo"},
            },
            {"resolution": "64x64", "duration": {"frames": 9}},
            "93f7b56f997713419f3257929031c008d30c6d30a3f9cd878b807f8c90f7ba69",
        ),
    ],
)
def test_runs_of_earlier_versions_can_be_resumed(
    schema: type[RunConfig], values: dict[str, Any], phase: dict[str, Any], expected: str
) -> None:
    """Computed before there were keys for interlaced, HDR and transparent pictures. A new key that changes
    training belongs into `_CAME_LATER`."""
    only = {"name": "only", "updates": 4, "learning_rate": 0.001, "global_batch_size": 2, **phase}
    made = schema.model_validate({"output_dir": "runs/x", "curriculum": {"phases": [only]}, **values})
    assert config_fingerprint(made) == expected
