"""Configuration + model strides + world size -> `RunPlan`: the only place that derives a phase's numbers.

Pure: `plan` and `check` run it without a GPU, the trainer runs it again on every rank and gets the same. Rules that need the
clips are in `aiprod_ds.curriculum.data_rules`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiprod_ds.config.curriculum import CurriculumAdapterConfig
from aiprod_ds.config.phase import BucketConfig, PhaseConfig
from aiprod_ds.config.vae import VAETrainerConfig
from aiprod_ds.curriculum.batch import BatchTriple, solve_batch
from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.phase import BucketPlan, PhaseEnd, PhasePlan, RunPlan, UpdateRange
from aiprod_ds.curriculum.plateau import earliest_plateau
from aiprod_ds.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStrides:
    """How many pixels and frames become one latent; from the model's own configuration.

    Attributes:
        spatial: Height and width must be multiples of it.
        temporal: The model takes 1 + temporal * k frames.
    """

    spatial: int
    temporal: int


def plan_run(config: VAETrainerConfig, *, world_size: int, strides: ModelStrides, source: str = "configuration") -> RunPlan:
    """Returns the phases of `config` as they run on `world_size` ranks.

    Args:
        config: The validated configuration.
        world_size: Ranks that share each global batch.
        strides: Of the model that is trained.
        source: How messages name the configuration, usually its file.

    Raises:
        PlanError: With every problem: a batch that does not divide, a resolution or frame count that the model cannot take.
    """
    problems: list[str] = []
    phases: list[PhasePlan] = []
    first = UpdateRange(minimum=0, maximum=0)
    for index, phase in enumerate(config.curriculum.phases):
        where = f"{source}: curriculum.phases[{index}]"
        planner = _PhasePlanner(config=config, world_size=world_size, strides=strides, where=where, problems=problems)
        buckets = planner.buckets(phase)
        if not buckets:
            continue  # its problems are collected; the plan is not returned
        phases.append(planner.plan(phase, index=index, first=first, buckets=buckets))
        first = first + phases[-1].length
    if problems:
        raise PlanError(problems)
    return RunPlan(phases=tuple(phases), world_size=world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PhasePlanner:
    config: VAETrainerConfig
    world_size: int
    strides: ModelStrides
    where: str
    problems: list[str]

    def buckets(self, phase: PhaseConfig) -> tuple[BucketPlan, ...]:
        if not phase.buckets:
            assert phase.resolution is not None, "the schema demands a shape"
            assert phase.duration is not None, "the schema demands a shape"
            only = BucketConfig(resolution=phase.resolution, duration=phase.duration)
            found = self._bucket(phase, only, self.where)
            return () if found is None else (found,)
        each = [self._bucket(phase, bucket, f"{self.where}.buckets[{index}]") for index, bucket in enumerate(phase.buckets)]
        return tuple(bucket for bucket in each if bucket is not None)

    def plan(self, phase: PhaseConfig, *, index: int, first: UpdateRange, buckets: tuple[BucketPlan, ...]) -> PhasePlan:
        adapter = self.config.curriculum.adapter
        policy, decay = (phase.moments, phase.moment_decay) if phase.moments else (adapter.moments, adapter.moment_decay)
        policy = policy if index else "keep"
        flip = phase.augment.random_flip
        return PhasePlan(
            index=index,
            name=phase.name,
            buckets=buckets,
            first=first,
            length=_length(phase),
            end=_end(phase),
            learning_rate=LearningRateSchedule(
                peak=phase.learning_rate * self._rate_scale(buckets),
                kind=phase.schedule,
                warmup_updates=phase.warmup_updates,
                updates=phase.limit_updates,
                final_ratio=phase.final_learning_rate_ratio,
            ),
            weight_decay=self.config.optimizer.weight_decay if phase.weight_decay is None else phase.weight_decay,
            loss_weights={**self.config.loss.weights(), **phase.loss},
            random_flip=self.config.data.random_flip if flip is None else flip,
            activation_checkpointing=phase.activation_checkpointing,
            moments=policy,
            moment_scale={"keep": 1.0, "reset": 0.0, "decay": decay or 0.0}[policy],
        )

    def _bucket(self, phase: PhaseConfig, bucket: BucketConfig, where: str) -> BucketPlan | None:
        self._check_resolution(bucket, where)
        frames = self._frames(bucket.duration.frames, where)
        triple = self._batch(phase, bucket, where)
        if triple is None:
            return None
        return BucketPlan(
            frames=frames,
            requested_frames=bucket.duration.frames,
            height=bucket.resolution.height,
            width=bucket.resolution.width,
            frame_rate_hz=bucket.duration.frame_rate_hz,
            global_batch_size=triple.global_batch_size,
            micro_batch_size=triple.micro_batch_size,
            accumulation=triple.accumulation,
            share=bucket.share,
        )

    def _check_resolution(self, bucket: BucketConfig, where: str) -> None:
        stride = self.strides.spatial
        for name, size in (("height", bucket.resolution.height), ("width", bucket.resolution.width)):
            if size % stride:
                below, above = size // stride * stride, (size // stride + 1) * stride
                nearest = f"{below} or {above}" if below else str(above)
                self.problems.append(
                    f"{where}.resolution.{name}: must be a multiple of the model's stride {stride}, got {size}. Use {nearest}."
                )

    def _frames(self, requested: int, where: str) -> int:
        snapped = snap_frames(requested, self.strides.temporal)
        if snapped != requested and self.config.curriculum.frames_policy == "strict":
            below = snapped - self.strides.temporal
            self.problems.append(
                f"{where}.duration.frames: must be 1 + {self.strides.temporal} * k for this model (frames_policy: strict), "
                f"got {requested}. Use {below} or {snapped}, or frames_policy: snap."
            )
        return snapped

    def _batch(self, phase: PhaseConfig, bucket: BucketConfig, where: str) -> BatchTriple | None:
        own = bucket.global_batch_size or bucket.micro_batch_size
        source: PhaseConfig | BucketConfig = bucket if own else phase
        try:
            return solve_batch(
                global_batch_size=self._scaled(source.global_batch_size),
                micro_batch_size=source.micro_batch_size,
                accumulation=bucket.accumulation or source.accumulation,
                world_size=self.world_size,
            )
        except ValueError as error:
            self.problems.append(f"{where}.{error}")
            return None

    def _scaled(self, global_batch_size: int | None) -> int | None:
        adapter = self.config.curriculum.adapter
        if global_batch_size is None or adapter.reference_world_size is None:
            return global_batch_size
        product = global_batch_size * self.world_size
        if product % adapter.reference_world_size:
            raise ValueError(
                f"global_batch_size: must stay whole after batch_scaling * {self.world_size} / {adapter.reference_world_size}, "
                f"got {global_batch_size}. Use a multiple of {adapter.reference_world_size}."
            )
        return product // adapter.reference_world_size

    def _rate_scale(self, buckets: tuple[BucketPlan, ...]) -> float:
        adapter = self.config.curriculum.adapter
        sizes = sorted({bucket.global_batch_size for bucket in buckets})
        if adapter.reference_global_batch_size is not None and len(sizes) > 1:
            self.problems.append(
                f"{self.where}.buckets: must have one global batch size with lr_scaling: {adapter.lr_scaling}, got {sizes}. "
                "Make them equal or use lr_scaling: none."
            )
        return rate_scale(adapter, sizes[0])


def snap_frames(requested: int, temporal_stride: int) -> int:
    """Returns the smallest 1 + temporal_stride * k that is at least `requested`.

    Example: 8 -> 9 and 16 -> 17 for strides 4 and 8; 49 stays 49 and 1 (an image) stays 1.
    """
    return 1 + -(-(requested - 1) // temporal_stride) * temporal_stride


def rate_scale(adapter: CurriculumAdapterConfig, global_batch_size: int) -> float:
    """Returns the factor of the learning rate: 1, ratio or sqrt(ratio) with ratio = global batch / reference.

    Worked number: batch 64 over reference 16 gives 4 (linear) or 2 (sqrt).
    """
    if adapter.reference_global_batch_size is None:
        return 1.0
    ratio = global_batch_size / adapter.reference_global_batch_size
    return ratio if adapter.lr_scaling == "linear" else math.sqrt(ratio)


def _end(phase: PhaseConfig) -> PhaseEnd:
    return PhaseEnd(
        limit_updates=phase.limit_updates,
        minimum_updates=phase.min_updates or 1,
        epochs=phase.epochs,
        plateau=phase.plateau,
    )


def _length(phase: PhaseConfig) -> UpdateRange:
    limit = phase.limit_updates
    if phase.epochs is not None:
        return UpdateRange(minimum=phase.min_updates or 1, maximum=limit)
    if phase.plateau is not None and limit is not None:
        earliest = max(phase.min_updates or 1, phase.warmup_updates + earliest_plateau(phase.plateau))
        return UpdateRange(minimum=min(earliest, limit), maximum=limit)
    return UpdateRange(minimum=limit or 1, maximum=limit)
