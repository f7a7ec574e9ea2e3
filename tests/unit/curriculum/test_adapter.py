"""What each field of `CurriculumAdapterConfig` does to the plan."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, PlanError

PHASE = {
    "resolution": "64x64",
    "duration": {"frames": 9},
    "global_batch_size": 8,
    "updates": 10,
    "learning_rate": 1e-3,
}
OVERRIDES = {
    "weight_decay": 0.5,
    "loss": {"kl_weight": 0.25},
    "augment": {"random_flip": False},
    "activation_checkpointing": True,
}


def config(adapter: dict[str, Any], *changes: dict[str, Any]) -> VAETrainerConfig:
    phases = [
        {
            "name": f"p{index}",
            **{key: value for key, value in {**PHASE, **change}.items() if value is not ...},
        }
        for index, change in enumerate(changes)
    ]
    curriculum = {"phases": phases, "adapter": adapter}
    return VAETrainerConfig.model_validate(
        {"output_dir": "out", "model": {"source": "M"}, "data": {"train": "s"}, "curriculum": curriculum}
    )


def plan(adapter: dict[str, Any], *changes: dict[str, Any], world_size: int = 2) -> RunPlan:
    return plan_run(
        config(adapter, *changes), world_size=world_size, strides=ModelStrides(spatial=32, temporal=8)
    )


def moments(adapter: dict[str, Any], *changes: dict[str, Any]) -> list[tuple[str, float]]:
    return [(phase.moments, phase.moment_scale) for phase in plan(adapter, *changes).phases]


@pytest.mark.parametrize("key", OVERRIDES)
def test_overrides_say_which_sections_a_phase_may_set(key: str) -> None:
    plan({"overrides": [key]}, {key: OVERRIDES[key]})
    with pytest.raises(
        ConfigError,
        match=rf"phases\[0\]\.{key}: has no effect, got a value while adapter\.overrides lacks it",
    ):
        plan({"overrides": [other for other in OVERRIDES if other != key]}, {key: OVERRIDES[key]})


def test_without_overrides_every_phase_is_as_the_other_sections_say() -> None:
    own = config({"overrides": []}, {})
    (phase,) = plan({"overrides": []}, {}).phases
    assert phase.weight_decay == own.optimizer.weight_decay
    assert dict(phase.loss_weights) == own.loss.weights()
    assert (phase.random_flip, phase.activation_checkpointing) == (own.data.random_flip, None)


@pytest.mark.parametrize(
    ("scaling", "factors"), [("none", [1.0, 1.0]), ("linear", [4.0, 0.25]), ("sqrt", [2.0, 0.5])]
)
def test_lr_scaling_follows_each_phases_batch(scaling: str, factors: list[float]) -> None:
    adapter = {"lr_scaling": scaling} | ({} if scaling == "none" else {"reference_global_batch_size": 16})
    phases = plan(adapter, {"global_batch_size": 64}, {"global_batch_size": 4}).phases
    # Exact: all factors are powers of two.
    assert [phase.learning_rate.peak for phase in phases] == [1e-3 * factor for factor in factors]


def test_lr_scaling_at_the_reference_batch_changes_nothing() -> None:
    assert (
        plan({"lr_scaling": "linear", "reference_global_batch_size": 8}, {}).phases[0].learning_rate.peak
        == 1e-3
    )


@pytest.mark.parametrize(("world_size", "batch"), [(1, 4), (2, 8), (4, 16), (6, 24)])
def test_batch_scaling_keeps_the_batch_of_a_rank(world_size: int, batch: int) -> None:
    adapter = {"batch_scaling": "world_size", "reference_world_size": 2}
    bucket = plan(adapter, {}, world_size=world_size).phases[0].buckets[0]
    assert (bucket.global_batch_size, bucket.micro_batch_size) == (batch, 4)


def test_batch_scaling_leaves_a_batch_that_is_given_by_rank() -> None:
    adapter = {"batch_scaling": "world_size", "reference_world_size": 2}
    by_rank = {"global_batch_size": ..., "micro_batch_size": 3, "accumulation": 2}
    scaled, plain = (plan(used, by_rank, world_size=4).phases[0].buckets[0] for used in (adapter, {}))
    assert scaled == plain
    assert scaled.global_batch_size == 24


def test_batch_scaling_reaches_buckets_with_their_own_batch() -> None:
    shape = {"resolution": "64x64", "duration": {"frames": 9}}
    buckets = [shape, {**shape, "global_batch_size": 4}]
    adapter = {"batch_scaling": "world_size", "reference_world_size": 1}
    (phase,) = plan(adapter, {"resolution": ..., "duration": ..., "buckets": buckets}).phases
    assert [bucket.global_batch_size for bucket in phase.buckets] == [16, 8]


def test_batch_scaling_is_refused_where_it_leaves_no_whole_batch() -> None:
    with pytest.raises(
        PlanError,
        match=r"phases\[0\]\.global_batch_size: must stay whole after batch_scaling \* 2 / 3, got 8",
    ):
        plan({"batch_scaling": "world_size", "reference_world_size": 3}, {})


def test_learning_rate_scales_with_the_batch_after_batch_scaling() -> None:
    adapter = {
        "batch_scaling": "world_size",
        "reference_world_size": 1,
        "lr_scaling": "linear",
        "reference_global_batch_size": 8,
    }
    rates = [
        plan(adapter, {}, world_size=world_size).phases[0].learning_rate.peak for world_size in (1, 2, 8)
    ]
    assert rates == [1e-3, 2e-3, 8e-3]


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({}, ("keep", 1.0)),
        ({"moments": "keep"}, ("keep", 1.0)),
        ({"moments": "reset"}, ("reset", 0.0)),
        ({"moments": "decay", "moment_decay": 0.25}, ("decay", 0.25)),
    ],
)
def test_moments_hold_for_every_phase_but_the_first(
    adapter: dict[str, Any], expected: tuple[str, float]
) -> None:
    assert moments(adapter, {}, {}, {}) == [("keep", 1.0), expected, expected]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"moments": "keep"}, ("keep", 1.0)),
        ({"moments": "reset"}, ("reset", 0.0)),
        ({"moments": "decay", "moment_decay": 0.5}, ("decay", 0.5)),
    ],
)
def test_a_phases_own_moments_win_over_the_adapters(own: dict[str, Any], expected: tuple[str, float]) -> None:
    assert moments({"moments": "decay", "moment_decay": 0.25}, {}, own, {}) == [
        ("keep", 1.0),
        expected,
        ("decay", 0.25),
    ]
