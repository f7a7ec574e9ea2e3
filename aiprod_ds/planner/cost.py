"""What the phases of a run need and cost on a kind of GPU: memory, seconds per update, GPU-hours and money.

Pure: workloads come in through `Trace`, so nothing here knows torch. `search` asks the same questions to
decide what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.planner.computing import Computing
from aiprod_ds.planner.hardware import Machine
from aiprod_ds.planner.memory import MemoryUse, can_capture, memory_use
from aiprod_ds.planner.roofline import update_seconds
from aiprod_ds.planner.workload import Workload

_SECONDS_PER_HOUR = 3600.0


class Trace(Protocol):
    """Where workloads come from."""

    def __call__(self, phase: PhasePlan, bucket: int, *, micro_batch_size: int, recompute: int) -> Workload:
        """Returns what one micro-batch takes.

        Raises:
            EngineError: If the model has nothing to recompute.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketCost:
    """One bucket of one phase on one kind of GPU.

    Attributes:
        updates: Of the bucket: the phase's longest length times the bucket's share.
        recompute: Of how many blocks one is computed again in the backward pass; 0: of none.
        is_captured: Whether the passes are CUDA graphs.
        is_bounded: Whether that is the most that it can be; otherwise it is the least.
        flops_per_update: Over all ranks, recomputation among them.
        fits: Whether GPU and host have what `memory` needs.
        gpu_hours: Of all updates on all GPUs; evaluation, saving and starting left out.
        dollars: At the price of the estimate.
    """

    phase: int
    name: str
    bucket: int
    shape: str
    parameters: int
    trained: int
    micro_batch_size: int
    accumulation: int
    recompute: int
    is_captured: bool
    zero_stage: int
    is_offloaded: bool
    updates: float
    is_bounded: bool
    flops_per_update: float
    memory: MemoryUse
    fits: bool
    seconds_per_update: float
    gpu_hours: float
    dollars: float

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready row, as `plan --json` prints it; of `memory` also `peak` and `needed`."""
        memory = {**asdict(self.memory), "peak": self.memory.peak, "needed": self.memory.needed}
        return {**asdict(self), "is_checkpointed": self.recompute > 0, "memory": memory}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """Answers for one run on one kind of GPU.

    Attributes:
        plan: The number of ranks is taken from here; phases come with each question.
        has_average: Whether the run keeps an average of the weights.
        dollars_per_gpu_hour: In place of the machine's.
        computing: Says how passes are computed with an engine's settings.
        recompute_levels: What `search` may choose from, of how many blocks one is computed again.
    """

    plan: RunPlan
    machine: Machine
    trace: Trace
    has_average: bool
    dollars_per_gpu_hour: float
    computing: Callable[[DeepSpeedSettings], Computing] = lambda _: Computing()
    recompute_levels: tuple[int, ...] = (0, 1)

    def costs(self, plan: RunPlan, settings: DeepSpeedSettings) -> list[BucketCost]:
        """Returns every bucket of every phase of `plan`, which is the run's with its batches and
        checkpointing as they are."""
        return [
            self.cost(phase, index, settings, recompute=recompute_of(phase, settings))
            for phase in plan.phases
            for index in range(len(phase.buckets))
        ]

    def cost(
        self,
        phase: PhasePlan,
        index: int,
        settings: DeepSpeedSettings,
        *,
        recompute: int,
        micro_batch_size: int | None = None,
        accumulation: int | None = None,
    ) -> BucketCost:
        """Returns one bucket, with another micro-batch of the same global batch if one is given; of another
        global batch if accumulation is given, too."""
        bucket, world_size = phase.buckets[index], self.plan.world_size
        size = micro_batch_size or bucket.micro_batch_size
        accumulation = accumulation or bucket.global_batch_size // (size * world_size)
        workload = self.trace(phase, index, micro_batch_size=size, recompute=recompute)
        computing = self.computing(settings)
        # What is recomputed reads the state of the random numbers, which a capture may not.
        is_captured = recompute == 0 and can_capture(
            workload, settings, self.machine, computing, world_size=world_size
        )
        memory = memory_use(
            workload,
            settings,
            world_size=world_size,
            accumulation=accumulation,
            has_average=self.has_average,
            computing=computing,
            is_captured=is_captured,
        )
        seconds = update_seconds(
            workload,
            settings,
            self.machine,
            world_size=world_size,
            accumulation=accumulation,
            computing=computing,
            is_captured=is_captured,
        )
        length = phase.length.maximum or phase.length.minimum
        updates = length * share_of(phase, bucket)
        gpu_hours = updates * seconds * world_size / _SECONDS_PER_HOUR
        return BucketCost(
            phase=phase.index,
            name=phase.name,
            bucket=index,
            shape=bucket.shape_text,
            parameters=workload.parameters,
            trained=workload.trained,
            micro_batch_size=size,
            accumulation=accumulation,
            recompute=recompute,
            is_captured=is_captured,
            zero_stage=settings.zero_stage,
            is_offloaded=settings.optimizer_offload,
            updates=updates,
            is_bounded=phase.length.maximum is not None,
            flops_per_update=workload.flops * accumulation * world_size,
            memory=memory,
            fits=memory.needed <= self.machine.memory_bytes and memory.host <= self.machine.host_memory_bytes,
            seconds_per_update=seconds,
            gpu_hours=gpu_hours,
            dollars=gpu_hours * self.dollars_per_gpu_hour,
        )


def recompute_of(phase: PhasePlan, settings: DeepSpeedSettings) -> int:
    """Returns of how many blocks the phase computes one again in the backward pass; 0 if none."""
    return phase.recompute(default=settings.activation_checkpointing)


def recompute_in_words(recompute: int) -> str:
    """Returns `off`, `on`, or which blocks."""
    return f"of 1 of {recompute} blocks" if recompute > 1 else "on" if recompute else "off"


def share_of(phase: PhasePlan, bucket: BucketPlan) -> float:
    """Returns the bucket's share of the phase's updates; equal ones where the data decides."""
    return 1.0 / len(phase.buckets) if bucket.share is None else bucket.share


def total_gpu_hours(costs: Sequence[BucketCost]) -> float:
    """Returns the GPU-hours of all buckets."""
    return sum(cost.gpu_hours for cost in costs)
