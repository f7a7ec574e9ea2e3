"""`buckets: auto`: the shapes of a phase, found from the aspect ratios and lengths of its clips.

The phase's own resolution and length are the most that a clip may be: H x W pixels a frame and F frames,
hence the budget of latent positions (tokens) a clip. A pure function of the clips as a set, so that neither
their order nor the number of ranks changes it. The rule:

1. Candidates. Lengths are those that the model takes and that some clip fills: of a clip with n frames at the
   phase's rate, the largest that is at most min(n, F). Sizes are multiples of the spatial stride with at most
   H x W pixels: for every aspect ratio among the clips, the largest sizes around that ratio, and the nearest
   to it that have 9/10 of these pixels.
2. Worth. A clip in a bucket shows `kept` of its picture (what is left after cropping to the bucket's aspect
   ratio) and `frames / min(n, F)` of its length; the product is the bucket's worth for it. Clips go to
   buckets as in training (`aiprod_ds.data.buckets.best_bucket`): most of the picture kept, then most frames,
   then the largest area.
3. Choice. The first bucket has the shortest of the lengths, so that every clip fits one. Then, one after the
   other, the candidate is added that raises the mean worth most, as long as it does by 0.01 and there are
   fewer than `most`; buckets that no clip goes to any more are dropped. Of thousands of aspect ratios, those
   within 1 % are taken as one for this.
4. Batch. The configured batch is that of the largest shape. A smaller shape gets as many clips a micro-batch
   as have no more tokens together, so that updates of all buckets cost about the same, but no more than its
   clips fill. Where `micro_batch_size` is given, micro-batches grow by single clips, else by whole
   multiples of the configured batch.

The bucket with most clips stands first: held-out clips are measured in it. Called by the trainers and by
`encode` once the clips are known; decodes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aiprod_ds.config.phase import AutoBuckets
from aiprod_ds.curriculum.data_rules import ClipFacts, Members, frames_at_rate
from aiprod_ds.curriculum.phase import AutoPlan, BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.strides import ModelStrides

_LEAST_GAIN = 0.01
_MANY_GROUPS = 5000
_STEPS_PER_OCTAVE, _COARSE_WIDTH = 64, 1 << 16  # 1.1 % apart
_FloatsG = npt.NDArray[np.float64]


class Shape(NamedTuple):
    """Frames, height and width of a bucket."""

    frames: int
    height: int
    width: int


def find_shapes(
    clips: Sequence[ClipFacts], largest: BucketPlan, rule: AutoBuckets, strides: ModelStrides
) -> tuple[Shape, ...]:
    """Returns the shapes that fit the clips best, the one with most clips first; only the largest one if no
    clip is long enough for any.

    Worked example: with strides of 8 and 4, at most 64x64 and 9 frames, of three clips of 1280x720 and one of
    720x1280 (width x height), all longer: 48x80 for the first three and 80x48, 9 frames each.
    """
    groups = _Groups.of(clips, largest, rule, strides)
    if not groups.counts.size:
        return (Shape(largest.frames, largest.height, largest.width),)
    coarse = groups.coarse()
    return _ordered(groups, _chosen(coarse, _candidates(coarse, largest, strides), rule.most))


def with_auto_buckets(
    plan: RunPlan, clips: Sequence[ClipFacts], *, shapes: Mapping[int, Sequence[Shape]] | None = None
) -> RunPlan:
    """Returns `plan` with the buckets of its phases with `buckets: auto`.

    Args:
        plan: From `plan_run`.
        clips: All clips to train on.
        shapes: Of phases, by index, that are not to be found anew; those that no clip fits best are left out.
    """
    phases = []
    for phase in plan.phases:
        if phase.auto is None:
            phases.append(phase)
            continue
        found = None if shapes is None else shapes.get(phase.index)
        if found is None:
            found = find_shapes(clips, phase.auto.largest, phase.auto.rule, phase.auto.strides)
        phases.append(_with_shapes(phase, phase.auto, found, clips))
    return replace(plan, phases=tuple(phases))


def auto_notes(plan: RunPlan, clips: Sequence[ClipFacts], members: Sequence[Members]) -> tuple[str, ...]:
    """Returns one sentence for every bucket that was found: how many clips it takes and what of them it does
    not show.

    Example: `phase low, bucket 1: found for 2 of 8 clips (25%): 9 frames 48x80, 6.2% of pictures cropped,
    0.0% of lengths left out, 180 of at most 192 tokens a clip, micro-batch 4`.

    Args:
        plan: After `with_auto_buckets`.
        clips: All clips to train on; `members` holds indices into them.
    """
    notes = []
    for phase, buckets in zip(plan.phases, members, strict=True):
        for index, (bucket, indices) in enumerate(zip(phase.buckets, buckets, strict=True)):
            if phase.auto is None or not indices:
                continue
            part = f", bucket {index}" if len(phase.buckets) > 1 else ""
            notes.append(f"phase {phase.name}{part}: {_found(phase.auto, bucket, clips, indices)}")
    return tuple(notes)


def _found(auto: AutoPlan, bucket: BucketPlan, clips: Sequence[ClipFacts], indices: Sequence[int]) -> str:
    largest, strides = auto.largest, auto.strides
    used = [clips[index] for index in indices]
    kept = sum(_kept(clip.height, clip.width, bucket.height, bucket.width) for clip in used) / len(used)
    shown = sum(
        bucket.frames / min(largest.frames, frames_at_rate(clip, bucket.frame_rate_hz)) for clip in used
    ) / len(used)
    cropped = (
        "" if bucket.is_sound else f" {bucket.height}x{bucket.width}, {1 - kept:.1%} of pictures cropped"
    )
    return (
        f"found for {len(used)} of {len(clips)} clips ({len(used) / len(clips):.0%}): {bucket.length_text}"
        f"{cropped}, {1 - shown:.1%} of lengths left out, {_tokens(bucket, strides):,} of at most "
        f"{_tokens(largest, strides):,} tokens a clip, micro-batch {bucket.micro_batch_size}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Clips of one aspect ratio and length counted together, in an order of their own; index g.

    Attributes:
        counts: Clips.
        parts: The sum over them of what one frame is of the frames that could be shown, 1 / min(n, F).
        heights: And `widths`: the aspect ratio.
        frames: The most that the model takes of such a clip.
    """

    counts: _FloatsG
    parts: _FloatsG
    heights: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]
    frames: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, clips: Sequence[ClipFacts], largest: BucketPlan, rule: AutoBuckets, strides: ModelStrides
    ) -> _Groups:
        shortest = max(1, min(strides.snap(rule.min_frames), largest.frames))
        counted: Counter[tuple[int, int, int, int]] = Counter()
        for clip in clips:
            seen = min(frames_at_rate(clip, largest.frame_rate_hz), largest.frames)
            fitting = strides.fit(seen)
            if fitting >= shortest:
                divisor = gcd(clip.height, clip.width)
                counted[clip.height // divisor, clip.width // divisor, fitting, seen] += 1
        # In one order, because sums of floats depend on it.
        return cls._summed((key[:3], counted[key], counted[key] / key[3]) for key in sorted(counted))

    def coarse(self) -> _Groups:
        """Returns the groups with near aspect ratios put together where there are very many: a choice among
        shapes takes as long as there are groups."""
        if len(self.counts) <= _MANY_GROUPS:
            return self
        steps = np.rint(np.log2(self.heights / self.widths) * _STEPS_PER_OCTAVE)
        heights = np.rint(_COARSE_WIDTH * np.exp2(steps / _STEPS_PER_OCTAVE)).astype(np.int64)
        keys = zip(heights.tolist(), self.frames.tolist(), strict=True)
        return self._summed(
            ((height, _COARSE_WIDTH, frames), count, part)
            for (height, frames), count, part in zip(
                keys, self.counts.tolist(), self.parts.tolist(), strict=True
            )
        )

    @classmethod
    def _summed(cls, items: Iterable[tuple[tuple[int, int, int], float, float]]) -> _Groups:
        counts: dict[tuple[int, int, int], float] = {}
        parts: dict[tuple[int, int, int], float] = {}
        for key, count, part in items:
            counts[key] = counts.get(key, 0.0) + count
            parts[key] = parts.get(key, 0.0) + part
        known = sorted(counts)
        columns = np.array(known, dtype=np.int64).reshape(-1, 3)
        return cls(
            counts=np.array([counts[key] for key in known], dtype=np.float64),
            parts=np.array([parts[key] for key in known], dtype=np.float64),
            heights=columns[:, 0],
            widths=columns[:, 1],
            frames=columns[:, 2],
        )

    def kept(self, shape: Shape) -> _FloatsG:
        """Returns `kept_fraction` of each group, bit for bit."""
        one, other = self.heights * shape.width, self.widths * shape.height
        kept: _FloatsG = np.minimum(one, other) / np.maximum(one, other)
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assignment:
    """Where each group of clips goes: of its bucket, the number (-1: none), `kept`, frames and area."""

    bucket: npt.NDArray[np.int64]
    kept: _FloatsG
    frames: npt.NDArray[np.int64]
    area: npt.NDArray[np.int64]

    @classmethod
    def to(cls, groups: _Groups, shapes: Sequence[Shape]) -> _Assignment:
        none = np.zeros(len(groups.counts), dtype=np.int64)
        found = cls(bucket=none - 1, kept=none.astype(np.float64), frames=none, area=none)
        for number, shape in enumerate(shapes):
            found = found.with_bucket(groups, shape, number)
        return found

    def with_bucket(self, groups: _Groups, shape: Shape, number: int) -> _Assignment:
        """Returns the assignment with one bucket more, behind the others: as `best_bucket` chooses."""
        kept, area = groups.kept(shape), shape.height * shape.width
        is_better = (kept > self.kept) | (
            (kept == self.kept)
            & ((shape.frames > self.frames) | ((shape.frames == self.frames) & (area > self.area)))
        )
        moves = (shape.frames <= groups.frames) & is_better
        return _Assignment(
            bucket=np.where(moves, number, self.bucket),
            kept=np.where(moves, kept, self.kept),
            frames=np.where(moves, shape.frames, self.frames),
            area=np.where(moves, area, self.area),
        )

    def worth(self, groups: _Groups) -> float:
        """Returns the mean worth over all clips."""
        return float((groups.parts * self.kept * self.frames).sum() / groups.counts.sum())


def _candidates(groups: _Groups, largest: BucketPlan, strides: ModelStrides) -> list[Shape]:
    """Returns all shapes to choose from, the largest first."""
    ratios = sorted(set(zip(groups.heights.tolist(), groups.widths.tolist(), strict=True)))
    sizes = (
        {(1, 1)}
        if largest.is_sound
        else {size for ratio in ratios for size in _sizes(ratio, largest, strides.spatial)}
    )
    lengths = sorted(set(groups.frames.tolist()))
    shapes = {Shape(frames, *size) for frames in lengths for size in sizes}
    return sorted(shapes, key=lambda shape: (-shape.frames, -shape.height * shape.width, shape))


def _sizes(ratio: tuple[int, int], largest: BucketPlan, stride: int) -> Iterator[tuple[int, int]]:
    """Yields the sizes around the largest one of an aspect ratio, height over width."""
    cells, (height, width) = largest.height * largest.width // stride**2, ratio
    for long, wide, is_turned in ((height, width, False), (width, height, True)):
        middle = isqrt(cells * long // wide)
        for rows in range(max(1, middle - 1), min(cells, middle + 1) + 1):
            nearest = min(cells // rows, (2 * rows * wide + long) // (2 * long))
            for columns in (cells // rows, nearest):
                if columns == cells // rows or 10 * rows * columns >= 9 * cells:
                    size = (rows * stride, columns * stride)
                    yield size[::-1] if is_turned else size


def _chosen(groups: _Groups, candidates: Sequence[Shape], most: int) -> list[Shape]:
    shortest = int(groups.frames.min())
    first = [shape for shape in candidates if shape.frames == shortest]
    chosen: list[Shape] = []
    worth = 0.0
    while len(chosen) < most:
        found = _Assignment.to(groups, chosen)
        worths = [
            found.with_bucket(groups, shape, len(chosen)).worth(groups)
            for shape in (candidates if chosen else first)
        ]
        best = max(range(len(worths)), key=worths.__getitem__)  # of equals the first
        if chosen and worths[best] - worth < _LEAST_GAIN:
            break
        worth = worths[best]
        chosen.append((candidates if chosen else first)[best])
        used = set(_Assignment.to(groups, chosen).bucket.tolist())
        chosen = [shape for number, shape in enumerate(chosen) if number in used]
    return chosen


def _ordered(groups: _Groups, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Returns the shapes from long to short and large to small, that with most clips in front; without those
    that lose their clips by it, which happens to clips that two of them fit equally well."""
    ordered = sorted(shapes, key=lambda shape: (-shape.frames, -shape.height * shape.width, shape))
    for _ in range(2):
        bucket = _Assignment.to(groups, ordered).bucket
        counts = [float(groups.counts[bucket == number].sum()) for number in range(len(ordered))]
        front = max(range(len(ordered)), key=counts.__getitem__)
        kept = [number for number in range(len(ordered)) if counts[number] and number != front]
        ordered = [ordered[front], *(ordered[number] for number in kept)]
    return tuple(ordered)


def _with_shapes(
    phase: PhasePlan, auto: AutoPlan, shapes: Sequence[Shape], clips: Sequence[ClipFacts]
) -> PhasePlan:
    groups = _Groups.of(clips, auto.largest, auto.rule, auto.strides)
    bucket = _Assignment.to(groups, shapes).bucket
    counts = [int(groups.counts[bucket == number].sum()) for number in range(len(shapes))]
    buckets = [
        _bucket(auto, shape, count)
        for shape, count in zip(shapes, counts, strict=True)
        if count or not groups.counts.size
    ]
    return replace(phase, buckets=tuple(buckets))


def _bucket(auto: AutoPlan, shape: Shape, num_clips: int) -> BucketPlan:
    largest, step = auto.largest, auto.batch_step
    plain = auto.bucket(*shape)
    own = largest.global_batch_size // step
    budget = own * _tokens(largest, auto.strides) // _tokens(plain, auto.strides)
    steps = max(1, min(budget, num_clips // step))
    return replace(
        plain, global_batch_size=steps * step, micro_batch_size=largest.micro_batch_size * steps // own
    )


def _tokens(bucket: BucketPlan, strides: ModelStrides) -> int:
    return (
        strides.latents(bucket.frames)
        * (bucket.height // strides.spatial)
        * (bucket.width // strides.spatial)
    )


def _kept(height: int, width: int, bucket_height: int, bucket_width: int) -> float:
    products = (height * bucket_width, width * bucket_height)
    return min(products) / max(products)
