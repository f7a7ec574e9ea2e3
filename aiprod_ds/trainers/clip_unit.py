"""What every trainer's unit does alike: its parameters, its stream of clips, and what the report says of its
data.

Owns nothing that depends on what a clip holds: loss, held-out measures and export are the trainers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.data_rules import TooShort
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.metrics.evaluations import NotJudged
from aiprod_ds.report.summary import DataSummary
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.unit import ClipWork, Stream
from aiprod_ds.trainers.clip_data import ClipData
from aiprod_ds.trainers.evaluation import measured_names
from aiprod_ds.trainers.measures import passed_over


@dataclass(slots=True, kw_only=True)
class ClipUnit:
    """The shared part of a `Unit`; a trainer's own derives from it and narrows `config` and `module` to what
    it takes.

    Attributes:
        config: Of the run.
        plan: The curriculum for this world size.
        data: Training and held-out clips.
        too_short: Training clips that some phase cannot use.
        snapped: What became of lengths that the model cannot take, in words.
        module: What the engine trains.
    """

    config: RunConfig
    plan: RunPlan
    data: ClipData
    too_short: tuple[TooShort, ...]
    snapped: tuple[str, ...]
    module: nn.Module

    @property
    def can_capture(self) -> bool:
        """No: the posterior's noise is drawn in the forward pass."""
        return False

    def prepare(self, phase: PhasePlan) -> None:
        """Leaves the module as it is, which a trainer does whose phases all train the same parameters."""

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Returns matrices and kernels, which are decayed, and vectors and scalars, which are not."""
        return decay_groups(self.module)

    def open_stream(self, phase: PhasePlan, clock: Clock, *, rank: int, world_size: int) -> Stream:
        """Returns the data of `phase` from where `clock` stands."""
        workers = self.config.data.num_workers
        return self.data.stream(
            phase,
            clock,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
            num_workers=workers,
            draw=self.draws,
        )

    def draws(
        self,
        tensors: Mapping[str, Tensor],  # noqa: ARG002  a trainer whose loss needs chance reads it
        places: Sequence[tuple[int, ...]],  # noqa: ARG002
    ) -> Mapping[str, Tensor]:
        """Returns nothing: the loss draws what it needs, or nothing is left to chance."""
        return {}

    def num_sampled_shapes(self) -> int:
        """Returns 0: nothing is sampled."""
        return 0

    def _measured_names(self) -> tuple[str, ...]:
        """Returns the names of the held-out clips that evaluations measure, by place."""
        bucket, limit = self.plan.phases[-1].buckets[0], self.config.evaluation.max_clips
        return measured_names(self.data, bucket, max_clips=limit)

    def _passed_over(self) -> tuple[NotJudged, ...]:
        """Returns the held-out clips that evaluations would measure, were they long enough."""
        bucket, limit = self.plan.phases[-1].buckets[0], self.config.evaluation.max_clips
        return passed_over(self.data, bucket, max_clips=limit)

    def clip_work(self, batch: MicroBatch) -> ClipWork | None:  # noqa: ARG002  a transformer's unit reads it
        """Returns nothing: a VAE has no tokens, and no convention says what it is credited with."""
        return None

    def data_summary(self) -> DataSummary:
        """Returns what the run trains on and what it could not use."""
        return self.data.summary(self.too_short)

    def replacements(self) -> tuple[str, ...]:
        """Returns snapped lengths and clips that do not fit their bucket."""
        return (*self.snapped, *self.data.replacements(self.plan))
