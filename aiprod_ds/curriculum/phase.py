"""A phase as it will run: every derived number in one frozen record.

`aiprod_ds.curriculum.plan` makes these from the configuration, the model's strides, the data and the world size; the loop,
the sampler, the planner's table and the report read them. Nobody else solves a batch triple or snaps a frame count.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiprod_ds.curriculum.lr import LearningRateSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketPlan:
    """Clips of one shape and their batch: `global_batch_size = micro_batch_size * accumulation * world_size`.

    Attributes:
        frames: Frames per clip after snapping to what the model takes.
        requested_frames: Frames that the configuration asked for.
        frame_rate_hz: Rate to which clips are resampled; None keeps each clip's own.
    """

    frames: int
    requested_frames: int
    height: int
    width: int
    frame_rate_hz: float | None
    global_batch_size: int
    micro_batch_size: int
    accumulation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """One phase. `first_update` is the run's update count when it begins, if every phase before it ran its full length."""

    index: int
    name: str
    buckets: tuple[BucketPlan, ...]
    first_update: int
    updates: int
    learning_rate: LearningRateSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The whole curriculum for one world size."""

    phases: tuple[PhasePlan, ...]
    world_size: int

    @property
    def total_updates(self) -> int:
        """Updates of all phases together."""
        return sum(phase.updates for phase in self.phases)
