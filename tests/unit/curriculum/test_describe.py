"""What a plan is told as: rows, totals and the learning-rate curve, against numbers worked out by hand."""

import json
from typing import Any

import pytest

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.describe import ClipCounts, describe, learning_rate_curve, totals
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides

STRIDES = ModelStrides(spatial=32, temporal=8)
SHAPE = {"resolution": "64x64", "duration": {"frames": 9}}
IMAGE = {"resolution": "32x64", "duration": {"frames": 1}}
PHASE = {**SHAPE, "global_batch_size": 8, "updates": 10, "learning_rate": 1e-3}
PLATEAU = {"patience_updates": 3, "smoothing": 0.5}
OPEN = {"updates": ..., "epochs": 2, "schedule": "constant"}


def config(*phases: dict[str, Any], **curriculum: Any) -> VAETrainerConfig:
    """A run with `phases`, each the standard phase with changes; the value ... removes a key."""
    full = [
        {
            "name": f"p{index}",
            **{key: value for key, value in {**PHASE, **changes}.items() if value is not ...},
        }
        for index, changes in enumerate(phases)
    ]
    return VAETrainerConfig.model_validate(
        {
            "output_dir": "out",
            "model": {"source": "M"},
            "data": {"train": "s"},
            "curriculum": {"phases": full, **curriculum},
        }
    )


def plan(*phases: dict[str, Any]) -> RunPlan:
    return plan_run(config(*phases), world_size=2, strides=STRIDES)


def buckets(*each: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"resolution": ..., "duration": ..., "buckets": list(each), **changes}


def rows(*phases: dict[str, Any], clips: ClipCounts | None = None) -> list[dict[str, Any]]:
    return describe(plan(*phases), strides=STRIDES, clips=clips)


def bounds(row: dict[str, Any], name: str) -> tuple[Any, Any, Any]:
    return row[name], row[f"min_{name}"], row[f"max_{name}"]


def test_a_row_holds_every_number_of_the_plan() -> None:
    given = config(
        {"duration": {"frames": 8}, "accumulation": 2, "warmup_updates": 3, "loss": {"kl_weight": 0.5}}
    )
    planned = plan_run(given, world_size=2, strides=STRIDES)
    (row,) = describe(planned, config=given, strides=STRIDES, clips=[[32]])
    assert json.loads(json.dumps(row)) == row
    assert row == {
        "phase": 0, "name": "p0", "bucket": 0,
        "height": 64, "width": 64, "requested_frames": 8, "frames": 9, "frame_rate_hz": None, "share": 1.0,
        "global_batch_size": 8, "micro_batch_size": 2, "accumulation": 2,
        "pixels_per_update": 8 * 9 * 64 * 64, "latent_tokens_per_update": 8 * 2 * 2 * 2,
        "ends_by": "updates", "end": {"limit_updates": 10, "minimum_updates": 1, "epochs": None, "plateau": None},  # noqa: E501
        "first_update": 0, "min_first_update": 0, "max_first_update": 0,
        "last_update": 9, "min_last_update": 9, "max_last_update": 9,
        "updates": 10, "min_updates": 10, "max_updates": 10,
        "samples": 80, "min_samples": 80, "max_samples": 80,
        "clips": 32, "epochs": 2.5, "min_epochs": 2.5, "max_epochs": 2.5,
        "learning_rate_max": 1e-3, "learning_rate_final": pytest.approx(1e-4, rel=1e-12),
        "schedule": "cosine", "warmup_updates": 3,
        "weight_decay": 0.01, "random_flip": True, "activation_checkpointing": None, "training_mode": "full", "lora_rank": None,  # noqa: E501
        "moments": "keep", "moment_scale": 1.0,
        "loss_weights": {**given.loss_weights(), "kl_weight": 0.5}, "overrides": {"loss.kl_weight": 0.5},
    }  # fmt: skip


def test_what_is_not_given_is_not_guessed() -> None:
    (row,) = describe(plan({}))
    assert [
        row[key] for key in ("latent_tokens_per_update", "clips", "epochs", "max_epochs", "overrides")
    ] == [None] * 5


def test_bounds_of_open_phases() -> None:
    plateau, passes, last = rows(
        {"updates": ..., "plateau": PLATEAU, "max_updates": 30, "min_updates": 7},
        OPEN,
        {},
        clips=[[16], [16], [16]],
    )
    assert (plateau["ends_by"], passes["ends_by"]) == ("plateau or updates", "epochs")
    assert plateau["end"]["plateau"] == {"patience_updates": 3, "threshold": 0.001, "smoothing": 0.5}
    assert (passes["end"]["epochs"], passes["end"]["limit_updates"]) == (2, None)
    assert bounds(plateau, "first_update") == (0, 0, 0)
    assert bounds(plateau, "last_update") == (None, 6, 29)
    assert bounds(plateau, "samples") == (None, 56, 240)
    assert bounds(plateau, "epochs") == (None, 3.5, 15.0)
    assert bounds(passes, "first_update") == (None, 7, 30)
    assert bounds(passes, "last_update") == (None, 7, None)
    assert bounds(passes, "samples") == (None, 8, None)
    assert passes["learning_rate_final"] == 1e-3  # constant: the peak
    assert bounds(last, "first_update") == (None, 8, None)
    assert bounds(last, "updates") == (10, 10, 10)


def test_buckets_divide_the_updates_by_share_by_clips_or_not_at_all() -> None:
    shared = buckets({**SHAPE, "share": 0.4}, {**IMAGE, "share": 0.6})
    free = buckets(SHAPE, {**IMAGE, "global_batch_size": 4})
    told = rows(
        shared, free, clips=[[8, 8], [16, 8]]
    )  # the second phase's pass takes 2 updates of each bucket
    assert [row["share"] for row in told] == [0.4, 0.6, 0.5, 0.5]
    assert [row["samples"] for row in told] == [32, 48, 40, 20]
    assert [row["epochs"] for row in told] == [4.0, 6.0, 2.5, 2.5]
    unknown = rows(shared, free)[2:]
    assert [bounds(row, "samples") for row in unknown] == [(None, None, None)] * 2
    assert [row["share"] for row in unknown] == [None, None]
    unusable = rows(free, clips=[[0, 0]])
    assert [(row["share"], row["epochs"]) for row in unusable] == [(None, None)] * 2


def test_totals_add_up_and_are_bounded_where_something_is_open() -> None:
    video, image = 8 * 9 * 64 * 64, 4 * 1 * 32 * 64
    free = buckets(SHAPE, {**IMAGE, "global_batch_size": 4})
    known = totals(
        plan({}, free), clips=[[16], [24, 4]]
    )  # 3 of 4 updates take the first bucket, rounded to 8 and 2 of 10
    assert [known["updates"], known["samples"], known["pixels"]] == [
        20,
        80 + 64 + 8,
        10 * video + 8 * video + 2 * image,
    ]
    mixed = totals(plan({}, free))
    assert bounds(mixed, "samples") == (None, 80 + 40, 80 + 80)
    assert bounds(mixed, "pixels") == (None, 10 * video + 10 * image, 20 * video)
    assert bounds(totals(plan({}, {**free, **OPEN})), "samples") == (None, 80 + 4, None)
    assert bounds(totals(plan({}, OPEN)), "updates") == (None, 11, None)


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({}, {}),
        (
            {"weight_decay": 0.01, "augment": {"random_flip": True}, "loss": {"kl_weight": 1e-6}},
            {},
        ),  # the same as the trainer's
        ({"weight_decay": 0.0}, {"weight_decay": 0.0}),
        ({"augment": {"random_flip": False}}, {"augment.random_flip": False}),
        ({"loss": {"perceptual_weight": 0.1}}, {"loss.perceptual_weight": 0.1}),
        ({"activation_checkpointing": False}, {"activation_checkpointing": False}),
        ({"moments": "reset"}, {"moments": "reset"}),
        ({"moments": "decay", "moment_decay": 0.5}, {"moments": "decay", "moment_decay": 0.5}),
    ],
)
def test_overrides_are_what_differs_from_the_trainers_own(
    changes: dict[str, Any], overrides: dict[str, Any]
) -> None:
    given = config({}, changes)
    first, second = describe(plan_run(given, world_size=2, strides=STRIDES), config=given)
    assert (first["overrides"], second["overrides"]) == ({}, overrides)


def test_curve_shows_edges_and_warm_up_ends() -> None:
    planned = plan({"warmup_updates": 4}, {**OPEN, "warmup_updates": 3}, {"updates": 1000})
    curve = learning_rate_curve(planned, 50)
    assert [point.update for point in curve] == sorted({point.update for point in curve})
    by_update = {point.update: point for point in curve}
    assert {0, 3, 9, 10, 12, 15, 16, 1015} <= set(by_update)  # the open phase is drawn at twice its warm-up
    assert len(curve) < 70
    assert by_update[3].learning_rate == planned.phases[0].learning_rate.at(3)
    assert by_update[16].learning_rate == planned.phases[2].learning_rate.at(0)
    assert [by_update[update].phase for update in (9, 10, 15, 16)] == [0, 1, 1, 2]
