"""Weights of the loss that move inside a phase, and parts of a VAE that a phase freezes: the schema and the
plan."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.phase import WeightRamp
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import describe
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError

SHAPE = {"resolution": "32x32", "duration": {"frames": 9}, "global_batch_size": 2}
RAMP = {"start": 0.0, "end": 1e-6, "updates": 4}


def _values(*phases: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": "unused",
        "model": {"source": "M"},
        "data": {"train": "unused"},
        "curriculum": {
            "phases": [
                {"name": f"p{index}", **SHAPE, "updates": 10, "learning_rate": 1e-3, **phase}
                for index, phase in enumerate(phases)
            ]
        },
    }


def _config(*phases: dict[str, Any]) -> VAETrainerConfig:
    return VAETrainerConfig.model_validate(_values(*phases))


def _plan(*phases: dict[str, Any]) -> RunPlan:
    return plan_run(_config(*phases), world_size=1, strides=ModelStrides(spatial=4, temporal=2))


def test_a_ramp_is_a_line_and_then_its_end() -> None:
    (phase,) = _plan({"loss": {"kl_weight": RAMP, "haar_weight": 0.5}}).phases
    assert [phase.weights_at(position)["kl_weight"] for position in range(6)] == [
        0.0, 2.5e-7, 5e-7, 7.5e-7, 1e-6, 1e-6,
    ]  # fmt: skip
    assert {phase.weights_at(position)["haar_weight"] for position in range(6)} == {0.5}


def test_a_ramp_may_come_down_and_counts_with_its_most() -> None:
    (phase,) = _plan({"loss": {"perceptual_weight": {"start": 1.0, "end": 0.0, "updates": 2}}}).phases
    assert [phase.weights_at(position)["perceptual_weight"] for position in (0, 1, 2, 9)] == [1, 0.5, 0, 0]
    assert phase.loss_weights["perceptual_weight"] == 1.0, "so the network is loaded"


def test_the_plan_says_what_a_phase_sets() -> None:
    stage = {"decoder_only": True, "frozen": ["head"], "latents": "mode", "loss": {"haar_weight": RAMP}}
    plan, config = _plan({}, stage), _config({}, stage)
    assert describe(plan, config=config)[1]["overrides"] == {
        "decoder_only": True,
        "frozen": ["head"],
        "latents": "mode",
        "loss.haar_weight": RAMP,
        "moments": "reset",
    }
    assert not plan.phases[1].trains_as(plan.phases[0])
    assert plan.phases[0].trains_as(plan.phases[0])


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            {"loss": {"kl_weight": {"start": 1.0, "end": 1.0, "updates": 2}}},
            "loss.kl_weight.end: must differ from start, got 1 for both",
        ),
        (
            {"loss": {"kl_weight": {**RAMP, "updates": 11}}},
            r"loss\.kl_weight\.updates: must be at most updates \(10\), got 11\. Lower it\.",
        ),
        ({"loss": {"kl_weigth": RAMP}}, "loss.kl_weigth: is not a weight of the loss section"),
        (
            {"frozen": ["encoder"], "moments": "keep"},
            r"phases\[1\]\.moments: must be reset where other parameters are trained, got keep",
        ),
    ],
)
def test_what_makes_no_sense_by_itself_is_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        _config({}, phase)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"decoder_only": True}, "decoder_only"),
        ({"frozen": ["a"]}, "frozen"),
        ({"latents": "mode"}, "latents"),
        ({"loss": {"video_weight": {"start": 0.5, "end": 1.0, "updates": 2}}}, "loss.video_weight"),
    ],
)
def test_a_transformer_has_no_stages(given: dict[str, Any], key: str) -> None:
    values = {
        **_values(given),
        "model": {"source": "LTXVideoTransformer3DModel"},
        "vae": {"source": "AutoencoderKLLTXVideo"},
    }
    message = rf"phases\[0\]\.{key}: has no effect for trainer diffusion, got a"
    with pytest.raises((ConfigError, ValueError), match=message):
        DiffusionTrainerConfig.model_validate(values)


def test_runs_from_before_keep_their_fingerprints() -> None:
    """Both hashes were taken before there were stages."""
    config = _config({}, {"loss": {"kl_weight": 0.5}})
    assert config_fingerprint(config)[:16] == "76b47c83676d16f0"
    assert [found[:16] for found in phase_fingerprints(config)] == ["03b3a97cb7e99087", "87c57c3aabd6ce55"]
    changed = _config({}, {"loss": {"kl_weight": RAMP}})
    assert phase_fingerprints(changed)[1] != phase_fingerprints(config)[1]
    for stage in ({"decoder_only": True}, {"frozen": ["a"]}, {"latents": "sample"}):
        assert phase_fingerprints(_config(stage)) != phase_fingerprints(_config({}))


def test_sound_has_stages_too() -> None:
    assert AudioVAETrainerConfig.has_stages
    assert WeightRamp(start=0.0, end=2.0, updates=2).at(1) == 1.0
