# ruff: noqa: E501  messages stand on one line, as users see them
"""What a plan asks of the clips: every refusal with its message, and what is listed instead of dropped in silence."""

from typing import Any

import pytest

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.curriculum.data_rules import ClipFacts, TooShort, check_data, frames_at_rate
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.data.buckets import bucket_clips
from aiprod_ds.errors import PlanError

_SHAPE = {"resolution": "64x64", "duration": {"frames": 9}}
_LONG = {"resolution": "64x64", "duration": {"frames": 49, "frame_rate_hz": 24.0}}


def _plan(*phases: dict[str, Any]) -> RunPlan:
    full = [
        {"name": f"p{n}", "global_batch_size": 8, "updates": 10, "learning_rate": 1e-3, **p}
        for n, p in enumerate(phases)
    ]
    values = {
        "output_dir": "o",
        "model": {"source": "M"},
        "data": {"train": "s"},
        "curriculum": {"phases": full},
    }
    return plan_run(
        VAETrainerConfig.model_validate(values), world_size=2, strides=ModelStrides(spatial=32, temporal=8)
    )


def _clip(name: str, frames: int, seconds: float = 1.0) -> ClipFacts:
    return ClipFacts(name=name, frames=frames, seconds=seconds, height=64, width=64)


def _check(plan: RunPlan, clips: list[ClipFacts]) -> tuple[TooShort, ...]:
    return check_data(plan, clips, [bucket_clips(clips, phase.buckets) for phase in plan.phases], "c.yaml")


def _problems(plan: RunPlan, clips: list[ClipFacts]) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        _check(plan, clips)
    return tuple(caught.value.problems)


def test_short_clips_are_listed_and_too_long_phases_refused() -> None:
    plan = _plan(_SHAPE, {**_SHAPE, "duration": {"frames": 16}}, {**_SHAPE, "duration": {"frames": 33}})
    clips = [_clip("a.mp4", 8), _clip("b.mp4", 20), _clip("c.mp4", 33)]
    assert [(short.phase, short.length, short.names) for short in _check(plan, clips)] == [
        ("p0", "9 frames", ("a.mp4",)),
        ("p1", "17 frames", ("a.mp4",)),
        ("p2", "33 frames", ("a.mp4", "b.mp4")),
    ]
    assert _problems(plan, clips[:1]) == (
        "c.yaml: curriculum.phases[0].duration: must be at most the frames of the longest clip (8, a.mp4), got 9. Shorten the phase's clips or add longer ones.",
        "c.yaml: curriculum.phases[1].duration: must be at most the frames of the longest clip (8, a.mp4), got 17 (16 snapped). Shorten the phase's clips or add longer ones.",
        "c.yaml: curriculum.phases[2].duration: must be at most the frames of the longest clip (8, a.mp4), got 33. Shorten the phase's clips or add longer ones.",
    )


def test_resampling_changes_how_long_a_clip_is() -> None:
    assert frames_at_rate(_clip("a", 60, seconds=2.0), 24.0) == 48
    assert frames_at_rate(_clip("a", 60, seconds=2.0), None) == 60
    assert frames_at_rate(_clip("a", 2, seconds=0.001), 24.0) == 1
    assert _problems(_plan({"buckets": [_LONG, _SHAPE]}), [_clip("a", 60, seconds=2.0)]) == (
        "c.yaml: curriculum.phases[0].buckets[0].duration: must be at most the frames of the longest clip at 24 Hz (48, a), got 49. Shorten the phase's clips or add longer ones.",
    )


def test_a_bucket_that_fits_no_clip_best_is_refused() -> None:
    plan = _plan({"buckets": [_SHAPE, {**_SHAPE, "resolution": "64x128"}]})
    assert _problems(plan, [_clip("a", 9), _clip("b", 20)]) == (
        "c.yaml: curriculum.phases[0].buckets[1]: must be the best fit of at least one clip, got none for 64x128 with 9 frames: all 2 fit another bucket of the phase better or are too short. Remove the bucket, add clips of its shape, or give all buckets a share.",
    )
    shared = _plan({"buckets": [{**_SHAPE, "share": 0.5}, {**_SHAPE, "resolution": "64x128", "share": 0.5}]})
    assert _check(shared, [_clip("a", 9), _clip("b", 20)]) == ()


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_clip_that_one_bucket_takes_is_not_listed(share: float | None) -> None:
    image = {"resolution": "64x64", "duration": {"frames": 1}, "share": share}
    clips = [_clip("video", 9), _clip("image", 1)]
    assert _check(_plan({"buckets": [{**_SHAPE, "share": share}, image]}), clips) == ()
    long = {"resolution": "64x64", "duration": {"frames": 17}, "share": share}
    assert _check(_plan({"buckets": [long, {**_SHAPE, "share": share}]}), [*clips, _clip("long", 17)]) == (
        TooShort(phase="p0", bucket=1, length="9 frames", names=("image",)),
    )


def test_no_clip_at_all_is_refused() -> None:
    assert _problems(_plan(_SHAPE), []) == (
        "c.yaml: data.train: must hold at least one readable clip, got none. Name a folder or manifest with clips.",
    )
