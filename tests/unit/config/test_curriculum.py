# ruff: noqa: E501  messages stand on one line, as users see them
"""Rules of the curriculum's schema: for each one configuration that passes and one that fails with its message."""

from typing import Any

import pytest

from aiprod_ds.config.curriculum import (
    CurriculumAdapterConfig,
    CurriculumConfig,
    PhaseConfig,
    default_phases,
    expand_preset,
)
from aiprod_ds.errors import ConfigError

SHAPE = {"resolution": "64x64", "duration": {"frames": 9}}
BUCKETS = [{**SHAPE, "share": 0.25}, {**SHAPE, "share": 0.75}]
PHASE = {
    "name": "a",
    **SHAPE,
    "global_batch_size": 4,
    "updates": 10,
    "learning_rate": 1e-3,
    "warmup_updates": 2,
}
PLATEAU = {"patience_updates": 3}


def phase(**changes: Any) -> dict[str, Any]:
    """A valid phase with `changes`; the value ... removes a key."""
    return {key: value for key, value in {**PHASE, **changes}.items() if value is not ...}


def bucketed(buckets: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return phase(resolution=..., duration=..., buckets=buckets, **changes)


@pytest.mark.parametrize(
    "values",
    [
        phase(),
        phase(global_batch_size=..., micro_batch_size=2),
        bucketed(BUCKETS),
        bucketed([SHAPE, {**SHAPE, "global_batch_size": 2}]),
        bucketed([{**SHAPE, "micro_batch_size": 2}], global_batch_size=...),
        phase(updates=..., epochs=3, schedule="constant"),
        phase(updates=..., epochs=3, max_updates=30, min_updates=3),
        phase(updates=..., plateau=PLATEAU, max_updates=30),
        phase(epochs=3, plateau=PLATEAU),
        phase(
            loss={"kl_weight": 0.1},
            augment={"random_flip": False},
            activation_checkpointing=True,
            weight_decay=0.0,
        ),
        phase(moments="decay", moment_decay=0.5),
        phase(resolution={"height": 32, "width": 64}),
    ],
)
def test_valid_phases_are_taken(values: dict[str, Any]) -> None:
    PhaseConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (phase(duration=...), "duration: must be given unless buckets are, got nothing. Add `duration:`."),
        (phase(duration={"frames": 9, "seconds": 1.0}), "frames: either this or seconds must be given, got both. Write for example {frames: 17}."),
        (phase(duration={"frame_rate_hz": 24.0}), "frames: either this or seconds must be given, got neither. Write for example {frames: 17}."),
        (phase(buckets=[SHAPE]), "resolution: has no effect beside buckets, got both. Remove one of the two."),
        (bucketed([*BUCKETS, SHAPE]), "buckets: must all have a share or none, got 2 of 3. Add or remove shares."),
        (bucketed([*BUCKETS, BUCKETS[0]]), "buckets: must have shares that sum to 1, got 1.25. Correct the shares."),
        (bucketed([{**SHAPE, "share": 1.0}, {**SHAPE, "share": 0.0}]), "buckets[1].share: must be above 0, got 0. Remove the bucket."),
        (phase(global_batch_size=...), "global_batch_size: this or micro_batch_size must be given, got neither. Set one of them."),
        (bucketed([SHAPE], global_batch_size=...), "buckets[0].global_batch_size: this or micro_batch_size must be given, got neither. Set one of them."),
        (phase(updates=...), "updates: one of updates, epochs and plateau must be given, got none. Say how the phase ends."),
        (phase(max_updates=20, epochs=1), "max_updates: has no effect beside updates, got 20. Remove one of the two."),
        (phase(updates=..., plateau=PLATEAU, schedule="constant"), "max_updates: must be given with plateau, got nothing. A plateau may never come: set the longest length."),
        (phase(min_updates=5), "min_updates: has no effect without epochs or plateau, got 5. Remove it."),
        (phase(warmup_updates=10), "updates: must exceed warmup_updates (10), got 10. Raise updates or lower warmup_updates."),
        (phase(updates=..., epochs=1, max_updates=2), "max_updates: must exceed warmup_updates (2), got 2. Raise max_updates or lower warmup_updates."),
        (phase(epochs=1, min_updates=11), "min_updates: must be at most updates (10), got 11. Lower it."),
        (phase(schedule="constant", final_learning_rate_ratio=0.5), "final_learning_rate_ratio: has no effect with schedule: constant, got 0.5. Remove it."),
        (phase(moments="keep", moment_decay=0.5), "moment_decay: goes with moments: decay, got moments: keep. Set both or neither."),
        (phase(moments="decay"), "moment_decay: goes with moments: decay, got moments: decay. Set both or neither."),
        (phase(resolution="64"), "must be HEIGHTxWIDTH or a mapping with both, got '64'. Write for example 256x256."),
    ],
)  # fmt: skip
def test_broken_phases_say_so(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PhaseConfig.model_validate(values)
    where = "resolution: " if message.startswith("must be HEIGHTxWIDTH") else ""
    inner = "duration." if message.startswith("frames: ") else ""
    assert f"PhaseConfig: {where}{inner}{message}" in caught.value.problems


def test_all_rules_of_a_phase_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        PhaseConfig.model_validate(phase(global_batch_size=..., warmup_updates=20, moments="decay"))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": []}, "phases: must have at least one entry, got an empty list. Add a phase."),
        ({"phases": [phase(), phase()]}, "phases[1].name: must be unique, got 'a' twice. Rename one of them."),
        ({"phases": [phase(moments="reset")]}, "phases[0].moments: has no effect in the first phase, got a value. Remove it."),
        ({"phases": [phase(loss={"kl_weight": 1.0})], "adapter": {"overrides": ["augment"]}},
         "phases[0].loss: has no effect, got a value while adapter.overrides lacks it. Remove it."),
        ({"preset": "default", "phases": [phase()]}, "preset: cannot stand beside phases, got both. Remove one of the two."),
        ({"preset": "big"}, "preset: must be 'default', got 'big'. Write default or list phases."),
    ],
)  # fmt: skip
def test_broken_curricula_say_so(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CurriculumConfig.model_validate(values)
    assert caught.value.problems == (f"CurriculumConfig: {message}",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scaling": "sqrt"}, "reference_global_batch_size: goes with lr_scaling, got None and lr_scaling: sqrt. Set both or neither."),
        ({"batch_scaling": "world_size"}, "reference_world_size: goes with batch_scaling, got None and batch_scaling: world_size. Set both or neither."),
        ({"moments": "decay"}, "moment_decay: goes with moments: decay, got moments: decay. Set both or neither."),
        ({"reference_world_size": 2}, "reference_world_size: goes with batch_scaling, got 2 and batch_scaling: none. Set both or neither."),
    ],
)  # fmt: skip
def test_broken_adapters_say_so(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CurriculumAdapterConfig.model_validate(values)
    assert caught.value.problems == (f"CurriculumAdapterConfig: {message}",)


def test_curriculum_without_phases_is_the_default_one() -> None:
    default = CurriculumConfig()
    assert default.phases == default_phases()
    assert CurriculumConfig.model_validate({"preset": "default"}) == default
    assert CurriculumConfig.model_validate(default.model_dump(mode="json")) == default
    assert [p.updates for p in default.phases] == [50_000, 100_000, 150_000]


def test_preset_leaves_everything_else_alone() -> None:
    assert expand_preset({"phases": [1]}) == {"phases": [1]}
    assert expand_preset(7) == 7
    assert expand_preset({"preset": "default", "frames_policy": "strict"})["frames_policy"] == "strict"
