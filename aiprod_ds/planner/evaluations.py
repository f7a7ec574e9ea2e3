"""What evaluations cost beside training, by counted passes through the model.

Pure: how often and how many passes come from plan and configuration, so `check` and `plan` can say it without
a GPU. A pass counts as many times as its clip has pixels of a clip of the last phase, in whose shape held-out
clips are measured; attention, which grows faster, is not counted apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.planner.cost import share_of

WARNED_SHARE = 0.05
"""Of the time, above which `check` and `plan` warn."""
_FORWARD_AND_BACKWARD, _WITH_RECOMPUTATION = 3.0, 4.0  # in forward passes


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCost:
    """Of a whole run.

    Attributes:
        evaluations: Times that held-out clips are measured, those before training and after each phase among
            them.
        previews: Times that clips are sampled; 0 where there are none.
        passes: Forward passes of all evaluations and previews, over all ranks, in clips of the last phase.
        share: Of all time, training and evaluation together.
        intervals: The keys that say how often, of those that the configuration sets.
    """

    evaluations: int
    previews: int
    passes: float
    share: float
    intervals: str

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready row."""
        row = asdict(self)
        del row["intervals"]
        return row

    @property
    def text(self) -> str:
        """In words, for `check` and `plan`."""
        sampled = f", {self.previews:,} previews" if self.previews else ""
        share = f"{100 * self.share:.2g} % of the time by counted passes"
        return f"{self.evaluations:,} evaluations{sampled}: {share}"

    @property
    def warning(self) -> str | None:
        """What to do about a share that is large; None if it is not."""
        if self.share <= WARNED_SHARE:
            return None
        rarer = f"Raise {self.intervals}, or lower" if self.intervals else "Lower"
        return (
            f"evaluation: takes about {100 * self.share:.0f} % of the time, by counted passes. "
            f"{rarer} evaluation.max_clips."
        )


def evaluation_cost(
    plan: RunPlan,
    config: RunConfig,
    *,
    forwards_per_clip: int = 1,
    preview_passes: float = 0.0,
    recompute_default: bool = False,
) -> EvaluationCost:
    """Returns what the evaluations of a run cost. Phases of open length count at their longest, or shortest
    if nothing bounds them.

    Worked number: 1,000 updates of 16 clips in one shape are 48,000 passes; 16 clips measured every 100
    updates, and before and after, 11 * 16 = 176, a share of 0.0037.

    Args:
        forwards_per_clip: Of one held-out clip.
        preview_passes: Of all clips of one preview, in clips of the last phase.
        recompute_default: Whether phases that do not say recompute blocks in the backward pass.
    """
    ranks, trained, updates, samples = plan.world_size, 0.0, 0, 0.0
    ends: list[int] = []
    pixels = _pixels_per_clip(plan.phases[-1])
    for phase in plan.phases:
        length = phase.length.maximum or phase.length.minimum
        recomputed = (
            recompute_default if phase.activation_checkpointing is None else phase.activation_checkpointing
        )
        per_clip = _WITH_RECOMPUTATION if recomputed else _FORWARD_AND_BACKWARD
        for bucket in phase.buckets:
            part = length * share_of(phase, bucket)
            trained += per_clip * part * bucket.pixels_per_update / pixels
            samples += part * bucket.global_batch_size
        updates += length
        ends.append(updates)
    evaluation = config.evaluation
    measured = _inside(updates, ends, evaluation.every_updates)
    if evaluation.every_samples is not None:
        measured += int(samples // evaluation.every_samples)
    evaluations = 1 + len(ends) + measured
    previews = 0
    if preview_passes:
        previews = 1 + len(ends) + _inside(updates, ends, config.preview_updates())
    # Every rank waits for those that have a clip more.
    clips = -(-evaluation.max_clips // ranks) * ranks
    passes = evaluations * clips * forwards_per_clip + previews * preview_passes
    total = trained + passes
    return EvaluationCost(
        evaluations=evaluations,
        previews=previews,
        passes=passes,
        share=passes / total if total else 0.0,
        intervals=_intervals(config, has_previews=previews > 0),
    )


def _intervals(config: RunConfig, *, has_previews: bool) -> str:
    evaluation = config.evaluation
    keys = {
        "evaluation.every_updates": evaluation.every_updates,
        "evaluation.every_samples": evaluation.every_samples,
        "preview.every_updates": config.preview_updates() if has_previews else None,
    }
    return " and ".join(key for key, every in keys.items() if every is not None)


def _inside(updates: int, ends: list[int], every: int | None) -> int:
    """Returns how many multiples of `every` lie inside phases."""
    if every is None:
        return 0
    return updates // every - sum(end % every == 0 for end in ends)


def _pixels_per_clip(phase: PhasePlan) -> float:
    bucket = phase.buckets[0]
    return bucket.pixels_per_update / bucket.global_batch_size
