"""What a plan asks of the data: clips that are long enough. Fed with plain facts, so it needs no decoder.

Called by `check`, `plan` and the trainer after the manifest is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFacts:
    """What the manifest knows of one clip: frames >= 1, seconds > 0, height and width in pixels."""

    name: str
    frames: int
    seconds: float
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TooShort:
    """Clips that one bucket of one phase cannot use, by name."""

    phase: str
    bucket: int
    frames: int
    names: tuple[str, ...]


def check_data(plan: RunPlan, clips: Sequence[ClipFacts], source: str = "configuration") -> tuple[TooShort, ...]:
    """Returns the clips that are too short for a bucket, by name, so that nothing is dropped in silence.

    Raises:
        PlanError: If there is no clip, or a bucket asks for more frames than every clip has; all such buckets at once.
    """
    if not clips:
        raise PlanError(
            f"{source}: data.train: must hold at least one readable clip, got none. Name a folder or manifest with clips."
        )
    problems: list[str] = []
    short: list[TooShort] = []
    for phase in plan.phases:
        for index, bucket in enumerate(phase.buckets):
            available = [(frames_at_rate(clip, bucket.frame_rate_hz), clip.name) for clip in clips]
            longest, name = max(available)
            names = tuple(clip_name for frames, clip_name in available if frames < bucket.frames)
            if longest < bucket.frames:
                problems.append(_too_long(phase, index, bucket, longest=longest, name=name, source=source))
            elif names:
                short.append(TooShort(phase=phase.name, bucket=index, frames=bucket.frames, names=names))
    if problems:
        raise PlanError(problems)
    return tuple(short)


def frames_at_rate(clip: ClipFacts, frame_rate_hz: float | None) -> int:
    """Returns how many frames `clip` has after resampling: its own, or floor(seconds * rate) and at least 1.

    Worked number: 2.0 seconds at 24 Hz have 48 frames.
    """
    return clip.frames if frame_rate_hz is None else max(1, int(clip.seconds * frame_rate_hz + 1e-6))


def _too_long(phase: PhasePlan, index: int, bucket: BucketPlan, *, longest: int, name: str, source: str) -> str:
    part = f".buckets[{index}]" if len(phase.buckets) > 1 else ""
    asked = (
        f"{bucket.frames}" if bucket.frames == bucket.requested_frames else f"{bucket.frames} ({bucket.requested_frames} snapped)"
    )
    rate = "" if bucket.frame_rate_hz is None else f" at {bucket.frame_rate_hz:g} Hz"
    return (
        f"{source}: curriculum.phases[{phase.index}]{part}.duration.frames: must be at most the frames of the longest clip"
        f"{rate} ({longest}, {name}), got {asked}. Lower frames or add longer clips."
    )
