"""Which clips a bucket takes: every clip once without shares, everywhere it is long enough with them."""

from __future__ import annotations

import math
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.curriculum.data_rules import ClipFacts, frames_at_rate
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.buckets import best_bucket, bucket_clips, kept_fraction, long_enough


def _bucket(
    shape: str, frames: int = 9, *, rate: float | None = None, share: float | None = None
) -> BucketPlan:
    width, height = map(int, shape.split("x"))
    return BucketPlan(
        frames=frames,
        requested_frames=frames,
        height=height,
        width=width,
        frame_rate_hz=rate,
        global_batch_size=4,
        micro_batch_size=4,
        accumulation=1,
        share=share,
    )


def _clip(shape: str, frames: int = 48, *, seconds: float = 2.0) -> ClipFacts:
    width, height = map(int, shape.split("x"))
    return ClipFacts(name=f"{shape}x{frames}", frames=frames, seconds=seconds, height=height, width=width)


_SIZES = st.sampled_from([256, 320, 512, 1080, 1920])
_SHAPES = st.builds(lambda width, height: f"{width}x{height}", _SIZES, _SIZES)
_CLIPS = st.lists(st.builds(_clip, _SHAPES, st.integers(1, 60)), max_size=12)
_BUCKETS = st.lists(st.builds(_bucket, _SHAPES, st.sampled_from([1, 9, 17, 49])), min_size=1, max_size=5)


def test_the_worked_number() -> None:
    clip = _clip("1920x1080")
    buckets = [_bucket("256x256"), _bucket("512x288"), _bucket("288x512")]
    assert [kept_fraction(clip, bucket) for bucket in buckets] == [0.5625, 1.0, pytest.approx(0.31640625)]
    assert best_bucket(clip, buckets) == 1


@pytest.mark.parametrize(
    ("clip", "buckets", "best"),
    [
        (
            _clip("640x640"),
            [_bucket("512x256"), _bucket("256x256"), _bucket("512x512", 1)],
            1,
        ),  # least crop, then most frames
        (
            _clip("640x640", 8),
            [_bucket("256x256"), _bucket("512x256", 1)],
            1,
        ),  # only the image is short enough
        (_clip("640x640", 8), [_bucket("256x256"), _bucket("512x256")], None),
        (
            _clip("640x640"),
            [_bucket("256x256", 9), _bucket("256x256", 17), _bucket("256x256", 49)],
            1,
        ),  # the longest it has
        (_clip("640x640"), [_bucket("256x256"), _bucket("512x512"), _bucket("320x320")], 1),  # the largest
        (
            _clip("640x640"),
            [_bucket("256x512"), _bucket("512x256")],
            0,
        ),  # mirrored buckets crop alike: the first
        (
            _clip("640x640"),
            [_bucket("320x480"), _bucket("480x320", 17)],
            1,
        ),  # and so the one with more frames
        (
            _clip("640x640", 48, seconds=2.0),
            [_bucket("256x256", 17), _bucket("256x256", 25, rate=12.0)],
            0,
        ),  # 24 frames at 12 Hz
    ],
)
def test_the_best_bucket(clip: ClipFacts, buckets: list[BucketPlan], best: int | None) -> None:
    assert best_bucket(clip, buckets) == best


@settings(max_examples=100, deadline=None)
@given(clips=_CLIPS, buckets=_BUCKETS)
def test_without_shares_every_clip_that_fits_is_in_one_bucket(
    clips: list[ClipFacts], buckets: list[BucketPlan]
) -> None:
    members = bucket_clips(clips, buckets)

    assert len(members) == len(buckets)
    usable = [
        index for index, clip in enumerate(clips) if any(clip.frames >= bucket.frames for bucket in buckets)
    ]
    assert sorted(chain.from_iterable(members)) == usable
    for bucket, indices in zip(buckets, members, strict=True):
        for index in indices:
            # Oracle: the rule as written, with logarithms; 1e-9 covers their rounding.
            crops = [_crop(clips[index], other) for other in buckets if clips[index].frames >= other.frames]
            assert clips[index].frames >= bucket.frames
            assert _crop(clips[index], bucket) <= min(crops) + 1e-9


def _crop(clip: ClipFacts, bucket: BucketPlan) -> float:
    return abs(math.log(clip.width / clip.height) - math.log(bucket.width / bucket.height))


def test_with_shares_a_clip_is_wherever_it_is_long_enough() -> None:
    buckets = [
        _bucket("512x256", 17, share=0.5),
        _bucket("256x512", 9, share=0.3),
        _bucket("256x256", 1, share=0.2),
    ]
    clips = [_clip("640x640", 48), _clip("640x640", 9), _clip("640x640", 1)]
    assert bucket_clips(clips, buckets) == ((0,), (0, 1), (0, 1, 2))


def test_an_image_has_one_frame_at_every_rate() -> None:
    image = _clip("640x640", 1, seconds=0.04)
    assert [frames_at_rate(image, rate) for rate in (None, 10.0, 60.0)] == [1, 1, 1]
    assert long_enough([image], _bucket("256x256", 2, rate=60.0)) == ()
    assert long_enough([image], _bucket("256x256", 1, rate=60.0)) == (0,)
