"""What a run does with its clips that a user might not expect, in sentences for the report. Rules that stop a run: `data_rules`.

Called by the trainers; decodes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiprod_ds.curriculum.data_rules import ClipFacts, Members, frames_at_rate
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan

_NAMED_CLIPS = 3
_RATE_TOLERANCE = 0.01


def data_notes(plan: RunPlan, clips: Sequence[ClipFacts], members: Sequence[Members]) -> tuple[str, ...]:
    """Returns one sentence for every bucket that enlarges clips, shows their frames twice, leaves out videos or repeats clips.

    Example: `phase high: 2 clips are smaller than 1024x1024 and enlarged: a.mp4, b.mp4`.

    Args:
        plan: Of `plan_run`.
        clips: Those to train on.
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
        yield f"{_number(slow, 'slower')} than {bucket.frame_rate_hz:g} Hz, so some frames come twice: {_names(slow)}"
    short = [clip for clip in clips if 1 < frames_at_rate(clip, bucket.frame_rate_hz) < bucket.frames]
    if bucket.share is not None and short:
        yield f"{_number(short, 'shorter')} than {bucket.length_text} and not drawn: {_names(short)}"
    if len(used) < bucket.global_batch_size:
        yield f"{_number(used, 'fewer')} than one global batch of {bucket.global_batch_size}, so clips repeat inside a batch"


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
