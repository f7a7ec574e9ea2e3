"""`buckets: auto`: against shapes computed by hand, and what holds for every set of clips."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.config.phase import AutoBuckets
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum import auto_buckets
from aiprod_ds.curriculum.auto_buckets import Shape, auto_notes, find_shapes, with_auto_buckets
from aiprod_ds.curriculum.data_rules import ClipFacts, frames_at_rate
from aiprod_ds.curriculum.phase import BucketPlan, RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.buckets import bucket_clips
from aiprod_ds.errors import ConfigError, PlanError

STRIDES = ModelStrides(spatial=8, temporal=4)


def _clip(width: int, height: int, frames: int, number: int = 0) -> ClipFacts:
    return ClipFacts(
        name=f"{width}x{height}-{frames}-{number}",
        frames=frames,
        seconds=frames / 24,
        height=height,
        width=width,
    )


def _largest(**changes: Any) -> BucketPlan:
    values = {
        "frames": 9,
        "requested_frames": 9,
        "height": 64,
        "width": 64,
        "frame_rate_hz": None,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "accumulation": 1,
    }
    return BucketPlan(**{**values, **changes})


def _shapes(clips: list[ClipFacts], *, strides: ModelStrides = STRIDES, **rule: int) -> list[Shape]:
    return list(find_shapes(clips, _largest(), AutoBuckets(**rule), strides))


def test_shapes_are_those_computed_by_hand() -> None:
    # Of at most 8x8 cells, 16:9 keeps 90/96 = 0.94 in 6x10 (60 cells), less in 5x12 (0.74) and 7x9 (0.72);
    # 5x9 would keep 80/81 but has 45 cells only.
    wide, tall = [_clip(1280, 720, 30, number) for number in range(3)], _clip(720, 1280, 9)
    assert _shapes([*wide, tall]) == [Shape(9, 48, 80), Shape(9, 80, 48)]
    assert _shapes([*wide, tall], most=1) == [Shape(9, 48, 80)]
    # 7 frames take the place of 5 that the model takes. The short clip is long enough for nothing else.
    short = _clip(1280, 720, 7)
    assert _shapes([*wide, short]) == [Shape(9, 48, 80), Shape(5, 48, 80)]
    assert _shapes([*wide, short], min_frames=6) == [Shape(9, 48, 80)]
    # With one shape every clip must fit: the shortest counts.
    assert _shapes([*wide, short], most=1) == [Shape(5, 48, 80)]
    # An image is a clip of one frame.
    image = _clip(512, 512, 1)
    assert _shapes([*wide, image]) == [Shape(9, 48, 80), Shape(1, 64, 64)]


def test_the_nearest_ratio_counts_where_it_costs_few_pixels() -> None:
    # 16:9 is 9x16 cells exactly: 144 of 160 cells (0.9) are enough, of 161 they would not be.
    clips = [_clip(1920, 1080, 9)]
    exact = find_shapes(clips, _largest(height=80, width=128), AutoBuckets(), STRIDES)
    assert exact == (Shape(9, 72, 128),)
    wider = find_shapes(clips, _largest(height=56, width=184), AutoBuckets(), STRIDES)  # 7x23 cells
    assert wider == (Shape(9, 72, 136),)


def test_another_shape_must_gain_a_percent() -> None:
    # 5:4 in 64x64 keeps 0.8, in 7x9 cells 35/36: of one in a hundred clips that gains 0.0017 on average.
    clips = [*(_clip(64, 64, 9, number) for number in range(99)), _clip(80, 64, 9)]
    assert _shapes(clips) == [Shape(9, 64, 64)]
    assert _shapes([*clips, *(_clip(80, 64, 9, number) for number in range(9))]) == [
        Shape(9, 64, 64),
        Shape(9, 56, 72),
    ]


def test_sounds_get_lengths() -> None:
    strides = ModelStrides(spatial=1, temporal=100, is_causal=False)
    clips = [
        *(ClipFacts(name=f"{n}", frames=1000, seconds=1.0, height=1, width=1) for n in range(3)),
        ClipFacts(name="s", frames=450, seconds=0.45, height=1, width=1),
    ]
    largest = _largest(frames=800, height=1, width=1)
    assert find_shapes(clips, largest, AutoBuckets(), strides) == (Shape(800, 1, 1), Shape(400, 1, 1))


def test_many_aspect_ratios_are_put_together_and_no_clip_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(0)
    clips = [
        _clip(drawn.randint(300, 900), drawn.randint(300, 900), drawn.randint(1, 12), n) for n in range(400)
    ]
    exact = _shapes(clips)
    monkeypatch.setattr(auto_buckets, "_MANY_GROUPS", 100)
    found = _shapes(clips)
    assert _shapes(clips[::-1]) == found
    buckets = [BucketPlan(**{**_fields(_largest()), **shape._asdict()}) for shape in found]
    members = bucket_clips(clips, buckets)
    assert sum(map(len, members)) == len(clips)
    assert all(members)
    # The choice is as good as that among all ratios: the same number of shapes, most of them the same.
    assert len(found) == len(exact)
    assert len(set(found) & set(exact)) > len(exact) / 2


def _config(**changes: Any) -> VAETrainerConfig:
    phase = {
        "name": "low",
        "resolution": "64x64",
        "duration": {"frames": 9},
        "buckets": "auto",
        "micro_batch_size": 4,
        "updates": 10,
        "learning_rate": 1e-3,
        **changes,
    }
    phase = {key: value for key, value in phase.items() if value is not None}
    return VAETrainerConfig.model_validate(
        {
            "output_dir": "o",
            "model": {"source": "M"},
            "data": {"train": "t"},
            "curriculum": {"phases": [phase]},
        }
    )


def _plan(clips: list[ClipFacts], *, world_size: int = 1, **changes: Any) -> RunPlan:
    plan = plan_run(_config(**changes), world_size=world_size, strides=STRIDES)
    return with_auto_buckets(plan, clips)


MIXED = [
    *(_clip(1280, 720, 30, number) for number in range(30)),
    *(_clip(720, 1280, 30, number) for number in range(20)),
    *(_clip(512, 512, 1, number) for number in range(40)),
]


def _batches(plan: RunPlan) -> list[tuple[str, int, int, int]]:
    return [
        (
            f"{bucket.frames}x{bucket.height}x{bucket.width}",
            bucket.global_batch_size,
            bucket.micro_batch_size,
            bucket.accumulation,
        )
        for bucket in plan.phases[0].buckets
    ]


def test_smaller_shapes_get_larger_batches_for_the_same_tokens() -> None:
    # 192 tokens a clip at most, 4 of them are 768: 768 // 180 = 4, 768 // 64 = 12.
    assert _batches(_plan(MIXED)) == [
        ("1x64x64", 12, 12, 1),
        ("9x48x80", 4, 4, 1),
        ("9x80x48", 4, 4, 1),
    ]


def test_batches_do_not_depend_on_the_number_of_ranks_where_the_global_one_is_given() -> None:
    for changes in ({"micro_batch_size": None}, {"micro_batch_size": 2}):
        sizes = [
            [
                size
                for _, size, _, _ in _batches(_plan(MIXED, world_size=ranks, global_batch_size=8, **changes))
            ]
            for ranks in (1, 2, 4)
        ]
        # 3 images have the tokens of one film: three times the batch.
        assert sizes == [[24, 8, 8]] * 3
    assert [_batches(_plan(MIXED, world_size=ranks, global_batch_size=8))[0] for ranks in (1, 2)] == [
        ("1x64x64", 24, 12, 2),
        ("1x64x64", 24, 12, 1),
    ]


def test_a_batch_holds_no_clip_twice_where_it_can_be_smaller() -> None:
    few = [*MIXED[:30], *MIXED[-3:]]
    assert _batches(_plan(few)) == [("9x48x80", 4, 4, 1), ("1x64x64", 3, 3, 1)]


def test_the_notes_say_what_was_found() -> None:
    clips = [*MIXED[:3], *MIXED[-1:], _clip(1280, 720, 8)]
    plan = _plan(clips)
    members = [bucket_clips(clips, phase.buckets) for phase in plan.phases]
    notes = auto_notes(plan, clips, members)
    assert [note.split(": ", 1)[0] for note in notes] == [f"phase low, bucket {index}" for index in range(3)]
    assert [note.split(": ", 1)[1].split(", ") for note in notes] == [
        [
            f"found for {count} of 5 clips ({count / 5:.0%}): {shape}",
            f"{cropped} of pictures cropped",
            f"{left_out} of lengths left out",
            f"{tokens} of at most 192 tokens a clip",
            f"micro-batch {count}",
        ]
        for count, shape, cropped, left_out, tokens in (
            (3, "9 frames 48x80", "6.2%", "0.0%", 180),
            (1, "5 frames 48x80", "6.2%", "37.5%", 120),
            (1, "1 frames 64x64", "0.0%", "0.0%", 64),
        )
    ]


def test_without_clips_the_plan_has_the_largest_shape() -> None:
    plan = plan_run(_config(), world_size=1, strides=STRIDES)
    assert _batches(plan) == [("9x64x64", 4, 4, 1)]
    listed = plan_run(
        _config(buckets=None, global_batch_size=4, micro_batch_size=None), world_size=1, strides=STRIDES
    )
    assert with_auto_buckets(listed, MIXED) == listed


def test_shapes_that_are_kept_are_not_found_anew() -> None:
    plan = plan_run(_config(), world_size=1, strides=STRIDES)
    kept = (Shape(9, 64, 64), Shape(5, 64, 64), Shape(1, 64, 64))
    found = with_auto_buckets(plan, MIXED, shapes={0: kept})
    assert [shape for shape, *_ in _batches(found)] == ["9x64x64", "1x64x64"], "no clip fits 5 frames best"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"buckets": "automatic"},
            r"buckets: must be auto or a list of shapes, got 'automatic'",
        ),
        ({"buckets": {"mos": 3}}, r"buckets\.mos: is not a known key"),
        ({"buckets": {"most": 0}}, r"buckets\.most: must be >= 1, got 0"),
        ({"duration": None}, r"duration: must be given with buckets: auto, got nothing"),
        (
            {"buckets": {"min_frames": 10}},
            r"buckets\.min_frames: must be at most duration\.frames \(9\), got 10",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**changes)


def test_rates_that_follow_the_batch_are_refused() -> None:
    config = _config(global_batch_size=4, micro_batch_size=None)
    adapter = config.curriculum.adapter.model_copy(
        update={"lr_scaling": "linear", "reference_global_batch_size": 4}
    )
    changed = config.model_copy(
        update={"curriculum": config.curriculum.model_copy(update={"adapter": adapter})}
    )
    with pytest.raises(PlanError, match=r"buckets: auto gives buckets batches of their own"):
        plan_run(changed, world_size=1, strides=STRIDES)


def test_the_resolved_configuration_loads_again() -> None:
    for buckets in ("auto", {"most": 3}):
        config = _config(buckets=buckets)
        again = VAETrainerConfig.model_validate(config.model_dump(mode="json"))
        assert again == config
        assert again.curriculum.phases[0].auto_buckets == AutoBuckets.model_validate(buckets)


_SIDES = st.integers(16, 2000)
_CLIPS = st.lists(st.tuples(_SIDES, _SIDES, st.integers(1, 60)), min_size=1, max_size=40)
_AREAS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(
    sides=_CLIPS, area=_AREAS, temporal=st.sampled_from([1, 4, 8]), most=st.integers(1, 9), seed=st.integers()
)
def test_every_clip_is_in_a_bucket_within_the_budget_whatever_the_order(
    sides: list[tuple[int, int, int]], area: tuple[int, int], temporal: int, most: int, seed: int
) -> None:
    strides = ModelStrides(spatial=16, temporal=temporal)
    clips = [_clip(*each, number) for number, each in enumerate(sides)]
    largest = _largest(height=16 * area[0], width=16 * area[1], frames=1 + 3 * temporal, frame_rate_hz=20.0)
    shapes = find_shapes(clips, largest, AutoBuckets(most=most), strides)
    assert 1 <= len(shapes) <= most
    for shape in shapes:
        assert shape.height % 16 == shape.width % 16 == 0 < min(shape)
        assert shape.height * shape.width <= largest.height * largest.width
        assert shape.frames <= largest.frames
        assert strides.snap(shape.frames) == shape.frames
    phase = plan_run(_config(), world_size=1, strides=STRIDES).phases[0]
    assert phase.auto is not None
    buckets = [BucketPlan(**{**_fields(largest), **shape._asdict()}) for shape in shapes]
    members = bucket_clips(clips, buckets)
    assert sorted(index for indices in members for index in indices) == list(range(len(clips)))
    assert all(members), "no bucket is without clips"
    assert len(members[0]) == max(map(len, members))
    assert all(
        frames_at_rate(clips[index], 20.0) >= bucket.frames
        for indices, bucket in zip(members, buckets, strict=True)
        for index in indices
    )
    shuffled = random.Random(seed).sample(clips, len(clips))
    assert find_shapes(shuffled, largest, AutoBuckets(most=most), strides) == shapes


def _fields(bucket: BucketPlan) -> dict[str, Any]:
    return {name: getattr(bucket, name) for name in BucketPlan.__dataclass_fields__}
