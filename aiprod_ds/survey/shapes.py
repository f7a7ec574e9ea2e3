"""Which shape of each phase a file goes into, and what that does to it.

Owns the words; the choice is `aiprod_ds.data.buckets`', and where shapes are to be found from the clips
`aiprod_ds.curriculum.auto_buckets`'. Called by `run.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from aiprod_ds.curriculum.auto_buckets import find_shapes
from aiprod_ds.curriculum.data_rules import ClipFacts, frames_at_rate
from aiprod_ds.curriculum.phase import AutoPlan, BucketPlan
from aiprod_ds.data.buckets import best_bucket, long_enough
from aiprod_ds.survey.demands import Demands, Phase
from aiprod_ds.survey.findings import Finding
from aiprod_ds.survey.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a file goes: the shape by phase, in words, and what is to be known of that."""

    buckets: dict[str, str]
    findings: tuple[Finding, ...]


class ShapeFinder:
    """Counts clips by what decides the shapes of phases that find them from the clips.

    Args:
        demands: Names the phases.
    """

    def __init__(self, demands: Demands) -> None:
        self._demands = demands
        self._counts: dict[str, Counter[tuple[int, int, int]]] = {
            phase.name: Counter() for phase in demands.phases if phase.auto is not None
        }

    def add(self, row: Row) -> None:
        """Counts a file that is trained on."""
        if not is_placed(row, self._demands):
            return
        facts = clip_facts(row, self._demands)
        divisor = gcd(facts.height, facts.width)
        for phase in self._demands.phases:
            if phase.auto is not None:
                largest = phase.auto.largest
                seen = min(frames_at_rate(facts, largest.frame_rate_hz), largest.frames)
                key = (facts.height // divisor, facts.width // divisor, seen)
                self._counts[phase.name][key] += 1

    def phases(self) -> tuple[Phase, ...]:
        """Returns the phases with their shapes."""
        return tuple(
            phase if phase.auto is None else replace(phase, buckets=self._found(phase.name, phase.auto))
            for phase in self._demands.phases
        )

    def _found(self, name: str, auto: AutoPlan) -> tuple[BucketPlan, ...]:
        clips: list[ClipFacts] = []
        for (height, width, frames), count in self._counts[name].items():
            seconds = frames / (auto.largest.frame_rate_hz or 1.0)
            clip = ClipFacts(name="", frames=frames, seconds=seconds, height=height, width=width)
            clips += [clip] * count
        return tuple(
            auto.bucket(*shape) for shape in find_shapes(clips, auto.largest, auto.rule, auto.strides)
        )


def is_placed(row: Row, demands: Demands) -> bool:
    """Returns whether a file goes into a shape at all."""
    return row.is_used and (row.height > 0 if demands.sounds is None else row.audio_rate_hz > 0)


def placement(row: Row, demands: Demands, phases: tuple[Phase, ...]) -> Placement:
    """Returns the shapes of a file of which `is_placed` holds.

    Args:
        row: Its facts.
        demands: What is asked.
        phases: With their shapes.
    """
    facts = clip_facts(row, demands)
    buckets: dict[str, str] = {}
    short: list[str] = []
    small: BucketPlan | None = None
    for phase in phases:
        chosen = _chosen(facts, phase)
        if chosen is None:
            least = min(phase.buckets, key=lambda bucket: bucket.frames)
            short.append(f"{phase.name} needs {least.length_text}")
            continue
        buckets[phase.name] = _words(facts, phase, chosen)
        is_small = not chosen.is_sound and (facts.height < chosen.height or facts.width < chosen.width)
        if is_small and (small is None or _area(chosen) > _area(small)):
            small = chosen
    return Placement(
        buckets=buckets,
        findings=tuple(_findings(facts, phases, short, small, is_asked=demands.configuration is not None)),
    )


def bucket_words(bucket: BucketPlan) -> str:
    """Returns `288x512, 17 frames`, height before width as configurations have it; of sound the length."""
    return bucket.length_text if bucket.is_sound else f"{bucket.height}x{bucket.width}, {bucket.length_text}"


def clip_facts(row: Row, demands: Demands) -> ClipFacts:
    """Returns what decides the shape of a file."""
    frames, seconds = row.frames, row.seconds
    if demands.sounds is not None:
        from aiprod_ds.decode.resampling import resampled_length  # loads torch, which takes seconds

        rate_hz = demands.sounds.sample_rate_hz
        samples = round(row.seconds * row.audio_rate_hz)
        frames = resampled_length(samples, from_hz=row.audio_rate_hz, to_hz=rate_hz)
        return ClipFacts(name=row.path, frames=frames, seconds=frames / rate_hz, height=1, width=1)
    return ClipFacts(name=row.path, frames=frames, seconds=seconds, height=row.height, width=row.width)


def _area(bucket: BucketPlan) -> int:
    return bucket.height * bucket.width


def _chosen(facts: ClipFacts, phase: Phase) -> BucketPlan | None:
    """Returns the shape that fits best, the largest of several where shares decide; None if all are too
    long."""
    if not phase.draws_by_share:
        index = best_bucket(facts, phase.buckets)
        return None if index is None else phase.buckets[index]
    fitting = [bucket for bucket in phase.buckets if long_enough([facts], bucket)]
    return max(fitting, key=lambda bucket: bucket.frames * _area(bucket), default=None)


def _words(facts: ClipFacts, phase: Phase, chosen: BucketPlan) -> str:
    number = sum(bool(long_enough([facts], bucket)) for bucket in phase.buckets)
    others = f" and {number - 1} more" if phase.draws_by_share and number > 1 else ""
    return bucket_words(chosen) + others


def _findings(
    facts: ClipFacts,
    phases: tuple[Phase, ...],
    short: list[str],
    small: BucketPlan | None,
    *,
    is_asked: bool,
) -> Iterator[Finding]:
    if short:
        kind = "too_short" if len(short) == len(phases) else "too_short_for_phase"
        least = min(
            (bucket for phase in phases for bucket in phase.buckets),
            key=lambda bucket: bucket.frames,
        )
        has = f"{frames_at_rate(facts, least.frame_rate_hz):,} {least.unit}"
        yield Finding(kind=kind, text=f"{has}, and {', '.join(short)}")
    if small is not None and is_asked:
        factor = max(small.height / facts.height, small.width / facts.width)
        yield Finding(kind="small", text=f"enlarged {factor:.2f} times for {small.height}x{small.width}")
