"""Which clips a bucket may take: the one that fits best without shares, every one that is long enough with
them.

Pure functions of what the manifest knows; nothing is decoded. `sampler` draws from the result, `check` and
the report name what no bucket takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiprod_ds.curriculum.data_rules import ClipFacts, frames_at_rate
from aiprod_ds.curriculum.phase import BucketPlan


def bucket_clips(clips: Sequence[ClipFacts], buckets: Sequence[BucketPlan]) -> tuple[tuple[int, ...], ...]:
    """Returns, for every bucket of one phase, the indices of its clips in rising order.

    Without shares every clip is in one bucket, `best_bucket`, or in none if all ask for more frames. With
    shares it is in every bucket that it is long enough for, so a bucket of one frame draws its images from
    videos too.
    """
    if buckets[0].share is not None:
        return tuple(long_enough(clips, bucket) for bucket in buckets)
    members: tuple[list[int], ...] = tuple([] for _ in buckets)
    for index, clip in enumerate(clips):
        best = best_bucket(clip, buckets)
        if best is not None:
            members[best].append(index)
    return tuple(map(tuple, members))


def best_bucket(clip: ClipFacts, buckets: Sequence[BucketPlan]) -> int | None:
    """Returns the index of the bucket that fits `clip` best; None if every one asks for more frames than it
    has.

    Among the buckets whose frames the clip has at their rate, the one that keeps most of the picture
    (`kept_fraction`), then the one with most frames, then the one with the largest area, then the first.

    Worked number: a clip of 1920x1080 (width x height) keeps all of 512x288, 0.5625 of 256x256 and 0.316 of
    288x512, so it goes to 512x288.
    """
    fitting = [index for index, bucket in enumerate(buckets) if _has_frames(clip, bucket)]

    def fit(index: int) -> tuple[float, int, int]:
        bucket = buckets[index]
        return kept_fraction(clip, bucket), bucket.frames, bucket.height * bucket.width

    return max(fitting, key=fit, default=None)


def kept_fraction(clip: ClipFacts, bucket: BucketPlan) -> float:
    """Returns the part of the clip's picture, in (0, 1], that is left after cropping it to the bucket's
    shape.

    min(a, b) / max(a, b) with a = clip height * bucket width and b = clip width * bucket height. Its
    logarithm is minus the distance of the two aspect ratios' logarithms; the quotient of whole numbers is the
    same for equal ratios, so ties are ties.
    """
    products = (clip.height * bucket.width, clip.width * bucket.height)
    return min(products) / max(products)


def long_enough(clips: Sequence[ClipFacts], bucket: BucketPlan) -> tuple[int, ...]:
    """Returns the indices of the clips that have the bucket's frames at its frame rate."""
    return tuple(index for index, clip in enumerate(clips) if _has_frames(clip, bucket))


def _has_frames(clip: ClipFacts, bucket: BucketPlan) -> bool:
    return frames_at_rate(clip, bucket.frame_rate_hz) >= bucket.frames
