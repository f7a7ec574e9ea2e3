"""What a plan asks of the data, and what a run does with its clips that a user might not expect. Fed with
plain facts; decodes nothing.

Rules stop a run (clips that are long enough, some for every bucket): `check`, `plan` and the trainers call
them once the manifest is read. Notes are sentences for `check` and
the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.errors import PlanError

Members = Sequence[tuple[int, ...]]
"""Of every bucket of one phase, the indices of its clips (`aiprod_ds.data.buckets.bucket_clips`)."""
_NAMED_CLIPS = 3
_RATE_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFacts:
    """What the manifest knows of one clip: frames >= 1 (an image has 1), seconds > 0, height and width in
    pixels.

    Of sound: samples at the rate of the run, the seconds that these last, and 1 by 1 pixels.
    """

    name: str
    frames: int
    seconds: float
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TooShort:
    """Clips that no bucket of one phase can use, by name; `bucket` is the one that asks for the shortest:
    `length`, in words."""

    phase: str
    bucket: int
    length: str
    names: tuple[str, ...]


def check_data(
    plan: RunPlan, clips: Sequence[ClipFacts], members: Sequence[Members], source: str = "configuration"
) -> tuple[TooShort, ...]:
    """Returns the clips that a phase cannot use because they are too short, by name, so that nothing is
    dropped in silence.

    Args:
        plan: Its buckets are what is asked of the clips.
        clips: All clips to train on; `members` holds indices into them.
        members: One entry a phase.
        source: How messages name the configuration.

    Raises:
        PlanError: If there is no clip, a bucket asks for more frames than every clip has, or every clip fits
            another bucket of the phase better; all such buckets at once.
    """
    if not clips:
        raise PlanError(
            f"{source}: data.train: must hold at least one readable clip, got none. Name a folder or "
            "manifest with clips."
        )
    problems: list[str] = []
    short: list[TooShort] = []
    for phase, buckets in zip(plan.phases, members, strict=True):
        problems += [
            _no_clip(phase, index, clips, source) for index, indices in enumerate(buckets) if not indices
        ]
        used = set(chain.from_iterable(buckets))
        names = tuple(clip.name for index, clip in enumerate(clips) if index not in used)
        if names:
            bucket = min(range(len(buckets)), key=lambda index: phase.buckets[index].frames)
            short.append(
                TooShort(
                    phase=phase.name, bucket=bucket, length=phase.buckets[bucket].length_text, names=names
                )
            )
    if problems:
        raise PlanError(problems)
    return tuple(short)


def frames_at_rate(clip: ClipFacts, frame_rate_hz: float | None) -> int:
    """Returns how many frames `clip` has after resampling: its own, or floor(seconds * rate) and at least 1.

    An image stays one frame at every rate. Worked number: 2.0 seconds at 24 Hz have 48 frames.
    """
    if frame_rate_hz is None or clip.frames == 1:
        return clip.frames
    return max(1, int(clip.seconds * frame_rate_hz + 1e-6))


def _no_clip(phase: PhasePlan, index: int, clips: Sequence[ClipFacts], source: str) -> str:
    bucket = phase.buckets[index]
    part = f".buckets[{index}]" if len(phase.buckets) > 1 else ""
    where = f"{source}: curriculum.phases[{phase.index}]{part}"
    longest, name = max((frames_at_rate(clip, bucket.frame_rate_hz), clip.name) for clip in clips)
    if longest < bucket.frames:
        return _too_long(bucket, where, longest=longest, name=name)
    shape = (
        bucket.length_text if bucket.is_sound else f"{bucket.height}x{bucket.width} with {bucket.length_text}"
    )
    return (
        f"{where}: must be the best fit of at least one clip, got none for {shape}: all {len(clips)} fit "
        "another bucket of the "
        "phase better or are too short. Remove the bucket, add clips of its shape, or give all buckets a "
        "share."
    )


def _too_long(bucket: BucketPlan, where: str, *, longest: int, name: str) -> str:
    asked = (
        f"{bucket.frames}"
        if bucket.frames == bucket.requested_frames
        else f"{bucket.frames} ({bucket.requested_frames} snapped)"
    )
    rate = "" if bucket.frame_rate_hz is None else f" at {bucket.frame_rate_hz:g} Hz"
    return (
        f"{where}.duration: must be at most the {bucket.unit} of the longest clip"
        f"{rate} ({longest}, {name}), got {asked}. Shorten the phase's clips or add longer ones."
    )


def data_notes(plan: RunPlan, clips: Sequence[ClipFacts], members: Sequence[Members]) -> tuple[str, ...]:
    """Returns one sentence for every bucket that enlarges clips, shows their frames twice, leaves out videos
    or repeats clips.

    Example: `phase high: 2 clips are smaller than 1024x1024 and enlarged: a.mp4, b.mp4`.

    Args:
        plan: Its buckets are what the clips are compared with.
        clips: All clips to train on; `members` holds indices into them.
        members: One entry a phase.
    """
    return tuple(
        f"{_where(phase, index)}: {note}"
        for phase, buckets in zip(plan.phases, members, strict=True)
        for index, indices in enumerate(buckets)
        for note in _notes(phase.buckets[index], clips, indices)
    )


def _notes(bucket: BucketPlan, clips: Sequence[ClipFacts], indices: Sequence[int]) -> Iterator[str]:
    used = [clips[index] for index in indices]
    small = [clip for clip in used if clip.height < bucket.height or clip.width < bucket.width]
    if small:
        yield f"{_number(small, 'smaller')} than {bucket.height}x{bucket.width} and enlarged: {_names(small)}"
    slow = [clip for clip in used if _repeats_frames(clip, bucket)]
    if slow:
        yield (
            f"{_number(slow, 'slower')} than {bucket.frame_rate_hz:g} Hz, so some frames come twice: "
            f"{_names(slow)}"
        )
    short = [clip for clip in clips if 1 < frames_at_rate(clip, bucket.frame_rate_hz) < bucket.frames]
    if bucket.share is not None and short:
        yield f"{_number(short, 'shorter')} than {bucket.length_text} and not drawn: {_names(short)}"
    if len(used) < bucket.global_batch_size:
        yield (
            f"{_number(used, 'fewer')} than one global batch of {bucket.global_batch_size}, so clips repeat "
            "inside a batch"
        )


def _repeats_frames(clip: ClipFacts, bucket: BucketPlan) -> bool:
    if bucket.frame_rate_hz is None or bucket.frames == 1:
        return False
    return bucket.frame_rate_hz > clip.frames / clip.seconds * (1 + _RATE_TOLERANCE)


def _where(phase: PhasePlan, index: int) -> str:
    return f"phase {phase.name}, bucket {index}" if len(phase.buckets) > 1 else f"phase {phase.name}"


def _number(clips: Sequence[ClipFacts], comparison: str) -> str:
    return f"1 clip is {comparison}" if len(clips) == 1 else f"{len(clips)} clips are {comparison}"


def _names(clips: Sequence[ClipFacts]) -> str:
    more = len(clips) - _NAMED_CLIPS
    return ", ".join(clip.name for clip in clips[:_NAMED_CLIPS]) + (f" and {more} more" if more > 0 else "")
