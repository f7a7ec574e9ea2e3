# ruff: noqa: E501  messages stand on one line, as users see them
"""Planning: batch triples, frames, bounds and overrides, with every refusal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.batch import solve_batch
from aiprod_ds.curriculum.phase import RunPlan, UpdateRange
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import PlanError

STRIDES = ModelStrides(spatial=32, temporal=8)
SHAPE = {"resolution": "64x64", "duration": {"frames": 9}}
PHASE = {**SHAPE, "global_batch_size": 8, "updates": 10, "learning_rate": 1e-3}
PLATEAU = {"patience_updates": 3, "smoothing": 0.5}


def config(
    *phases: dict[str, Any], curriculum: dict[str, Any] | None = None, **sections: Any
) -> VAETrainerConfig:
    """A run with `phases`, each the standard phase with changes; the value ... removes a key."""
    full = [
        {
            "name": f"p{index}",
            **{key: value for key, value in {**PHASE, **changes}.items() if value is not ...},
        }
        for index, changes in enumerate(phases)
    ]
    values = {"output_dir": "out", "model": {"source": "M"}, "data": {"train": "s"}, **sections}
    return VAETrainerConfig.model_validate({**values, "curriculum": {"phases": full, **(curriculum or {})}})


def plan(
    *phases: dict[str, Any], world_size: int = 2, strides: ModelStrides = STRIDES, **rest: Any
) -> RunPlan:
    return plan_run(config(*phases, **rest), world_size=world_size, strides=strides)


def problems(*phases: dict[str, Any], **rest: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(*phases, **rest)
    return [problem.removeprefix("configuration: curriculum.phases") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("given_numbers", "world", "triple"),
    [
        ({"global_batch_size": 8}, 2, (8, 4, 1)),
        ({"micro_batch_size": 3}, 2, (6, 3, 1)),
        ({"global_batch_size": 8, "micro_batch_size": 2}, 2, (8, 2, 2)),
        ({"global_batch_size": 8, "accumulation": 2}, 2, (8, 2, 2)),
        ({"micro_batch_size": 2, "accumulation": 4}, 3, (24, 2, 4)),
        ({"global_batch_size": 24, "micro_batch_size": 2, "accumulation": 4}, 3, (24, 2, 4)),
    ],
)
def test_any_two_numbers_give_the_third(
    given_numbers: dict[str, int], world: int, triple: tuple[int, int, int]
) -> None:
    bucket = plan({"global_batch_size": ..., **given_numbers}, world_size=world).phases[0].buckets[0]
    assert (bucket.global_batch_size, bucket.micro_batch_size, bucket.accumulation) == triple


@given(
    sizes=st.tuples(
        st.none() | st.integers(1, 64), st.none() | st.integers(1, 16), st.none() | st.integers(1, 8)
    ),
    world=st.integers(1, 16),
)
def test_no_triple_is_ever_inconsistent(sizes: tuple[int | None, int | None, int | None], world: int) -> None:
    total, micro, accumulation = sizes
    if total is None and micro is None:
        return
    try:
        triple = solve_batch(
            global_batch_size=total, micro_batch_size=micro, accumulation=accumulation, world_size=world
        )
    except ValueError:
        assert total is not None
        assert total % ((micro or 1) * (accumulation or 1) * world) or (micro and accumulation)
        return
    assert triple.global_batch_size == triple.micro_batch_size * triple.accumulation * world
    assert min(triple.micro_batch_size, triple.accumulation) >= 1
    assert total in (None, triple.global_batch_size)
    assert micro in (None, triple.micro_batch_size)
    assert accumulation in (None, triple.accumulation)


@pytest.mark.parametrize(
    ("requested", "stride", "used"),
    [
        (8, 8, 9),
        (8, 4, 9),
        (16, 8, 17),
        (16, 4, 17),
        (49, 8, 49),
        (1, 8, 1),
        (2, 8, 9),
        (9, 8, 9),
        (10, 8, 17),
        (7, 1, 7),
    ],
)
def test_frames_snap_up_to_the_next_that_fits(requested: int, stride: int, used: int) -> None:
    assert ModelStrides(spatial=1, temporal=stride).snap(requested) == used
    bucket = (
        plan({"duration": {"frames": requested}}, strides=ModelStrides(spatial=32, temporal=stride))
        .phases[0]
        .buckets[0]
    )
    assert (bucket.requested_frames, bucket.frames) == (requested, used)


@pytest.mark.parametrize(
    ("phase", "rest", "message"),
    [
        ({"global_batch_size": 7}, {}, "[0].global_batch_size: must be a multiple of accumulation (1) * world size (2) = 2, got 7. Use 6 or 8."),
        ({"global_batch_size": 1}, {}, "[0].global_batch_size: must be a multiple of accumulation (1) * world size (2) = 2, got 1. Use 2."),
        ({"micro_batch_size": 3}, {}, "[0].global_batch_size: must be a multiple of micro_batch_size (3) * world size (2) = 6, got 8. Use 6 or 12."),
        ({"micro_batch_size": 3, "accumulation": 2}, {}, "[0].global_batch_size: must be micro_batch_size (3) * accumulation (2) * world size (2) = 12, got 8. Leave one of the three out."),
        ({"resolution": "60x64"}, {}, "[0].resolution.height: must be a multiple of the model's stride 32, got 60. Use 32 or 64."),
        ({"resolution": "64x16"}, {}, "[0].resolution.width: must be a multiple of the model's stride 32, got 16. Use 32."),
        ({"duration": {"frames": 8}}, {"curriculum": {"frames_policy": "strict"}}, "[0].duration.frames: must give 1 + 8 * k frames for this model (frames_policy: strict), got 8. Use 1 or 9, or frames_policy: snap."),
        ({"resolution": ..., "duration": ..., "buckets": [SHAPE, {**SHAPE, "global_batch_size": 3}]}, {}, "[0].buckets[1].global_batch_size: must be a multiple of accumulation (1) * world size (2) = 2, got 3. Use 2 or 4."),
        ({"global_batch_size": 5}, {"curriculum": {"adapter": {"batch_scaling": "world_size", "reference_world_size": 3}}}, "[0].global_batch_size: must stay whole after batch_scaling * 2 / 3, got 5. Use a multiple of 3."),
        ({"resolution": ..., "duration": ..., "buckets": [SHAPE, {**SHAPE, "global_batch_size": 4}]}, {"curriculum": {"adapter": {"lr_scaling": "sqrt", "reference_global_batch_size": 4}}}, "[0].buckets: must have one global batch size with lr_scaling: sqrt, got [4, 8]. Make them equal or use lr_scaling: none."),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why_and_what_would(
    phase: dict[str, Any], rest: dict[str, Any], message: str
) -> None:
    assert problems(phase, **rest) == [message]


def test_problems_of_all_phases_come_at_once() -> None:
    found = problems({"global_batch_size": 7, "resolution": "33x64"}, {}, {"global_batch_size": 9})
    assert [problem[:3] for problem in found] == ["[0]", "[0]", "[2]"]


def test_bounds_add_up_over_open_phases() -> None:
    phases = plan(
        {},
        {"updates": ..., "plateau": PLATEAU, "max_updates": 30, "warmup_updates": 4, "min_updates": 7},
        {"updates": ..., "epochs": 2, "schedule": "constant"},
        {"epochs": 2, "min_updates": 3},
    )
    assert [(p.length.minimum, p.length.maximum) for p in phases.phases] == [
        (10, 10),
        (9, 30),
        (1, None),
        (3, 10),
    ]
    assert [(p.first.minimum, p.first.maximum) for p in phases.phases] == [
        (0, 0),
        (10, 10),
        (19, 40),
        (20, None),
    ]
    assert [p.first_update for p in phases.phases] == [0, 10, None, None]
    assert (phases.phases[0].updates, phases.phases[1].updates, phases.total_updates) == (10, None, None)
    assert phases.total == UpdateRange(minimum=23, maximum=None)
    assert plan({}, {"updates": 5}).total_updates == 15


def test_phases_override_the_other_sections_and_the_rest_stays() -> None:
    first, second = plan(
        {},
        {
            "loss": {"perceptual_weight": 0.1},
            "weight_decay": 0.5,
            "augment": {"random_flip": False},
            "activation_checkpointing": True,
            "moments": "decay",
            "moment_decay": 0.25,
        },
        optimizer={"weight_decay": 0.2},
        curriculum={"adapter": {"moments": "reset"}},
    ).phases
    assert (first.weight_decay, first.random_flip, first.activation_checkpointing) == (0.2, True, None)
    assert (first.moments, first.moment_scale) == ("keep", 1.0)
    assert (second.weight_decay, second.random_flip, second.activation_checkpointing) == (0.5, False, True)
    assert (second.moments, second.moment_scale) == ("decay", 0.25)
    assert first.loss_weights["perceptual_weight"] == 1.0
    assert dict(second.loss_weights) == {**first.loss_weights, "perceptual_weight": 0.1}


def test_buckets_have_their_own_batch_and_share() -> None:
    buckets = [
        {**SHAPE, "share": 0.75, "micro_batch_size": 1, "accumulation": 2},
        {"resolution": "128x64", "duration": {"frames": 1}, "share": 0.25},
    ]
    video, image = plan({"resolution": ..., "duration": ..., "buckets": buckets}).phases[0].buckets
    assert (video.global_batch_size, video.micro_batch_size, video.accumulation, video.share) == (
        4,
        1,
        2,
        0.75,
    )
    assert (image.frames, image.global_batch_size, image.micro_batch_size, image.pixels_per_update) == (
        1,
        8,
        4,
        8 * 128 * 64,
    )
