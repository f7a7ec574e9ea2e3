"""Configuration + model strides + world size -> `RunPlan`: the only place that derives a phase's numbers.

Pure: `plan` and `check` run it without a GPU, the trainer runs it again on every rank and gets the same.
Rules that need the clips are in `aiprod_ds.curriculum.data_rules`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiprod_ds.config.curriculum import CurriculumAdapterConfig
from aiprod_ds.config.phase import BucketConfig, PhaseConfig, PhaseDuration, PhaseResolution, WeightRamp
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.batch import BatchTriple, solve_batch
from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.phase import AutoPlan, BucketPlan, PhaseEnd, PhasePlan, RunPlan, UpdateRange
from aiprod_ds.curriculum.plateau import earliest_plateau
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import PlanError

_WITHOUT_PICTURE = PhaseResolution(height=1, width=1)


def plan_run(
    config: RunConfig, *, world_size: int, strides: ModelStrides, source: str = "configuration"
) -> RunPlan:
    """Returns the phases of `config` as they run on `world_size` ranks.

    Args:
        config: Valid by itself; what needs the model and the number of ranks is checked here.
        world_size: Ranks that share each global batch.
        strides: Snap the lengths and refuse sizes; of latents, those of the VAE that made them.
        source: How messages name the configuration, usually its file.

    Raises:
        PlanError: With every problem: a batch that does not divide, a resolution or frame count that the
            model cannot take.
    """
    problems: list[str] = []
    phases: list[PhasePlan] = []
    first = UpdateRange(minimum=0, maximum=0)
    for index, phase in enumerate(config.curriculum.phases):
        where = f"{source}: curriculum.phases[{index}]"
        planner = _PhasePlanner(
            config=config, world_size=world_size, strides=strides, where=where, problems=problems
        )
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
    config: RunConfig
    world_size: int
    strides: ModelStrides
    where: str
    problems: list[str]

    def buckets(self, phase: PhaseConfig) -> tuple[BucketPlan, ...]:
        if not phase.listed_buckets:
            assert phase.duration is not None, "the schema demands a length"
            only = BucketConfig(resolution=phase.resolution, duration=phase.duration)
            found = self._bucket(phase, only, self.where)
            return () if found is None else (found,)
        each = [
            self._bucket(phase, bucket, f"{self.where}.buckets[{index}]")
            for index, bucket in enumerate(phase.listed_buckets)
        ]
        return tuple(bucket for bucket in each if bucket is not None)

    def plan(
        self, phase: PhaseConfig, *, index: int, first: UpdateRange, buckets: tuple[BucketPlan, ...]
    ) -> PhasePlan:
        adapter = self.config.curriculum.adapter
        policy, decay = (
            (phase.moments, phase.moment_decay) if phase.moments else (adapter.moments, adapter.moment_decay)
        )
        adapters = self.config.phase_adapters(phase)
        policy = policy if index else "keep"
        before = self.config.curriculum.phases[max(index - 1, 0)]
        is_same_part = phase.trained_part == before.trained_part
        if index and not (is_same_part and adapters == self.config.phase_adapters(before)):
            policy = "reset"  # other parameters are trained, so a new optimizer begins
        flip = phase.augment.random_flip
        ramps = {name: weight for name, weight in phase.loss.items() if isinstance(weight, WeightRamp)}
        weights = {
            name: max(weight.start, weight.end) if isinstance(weight, WeightRamp) else weight
            for name, weight in phase.loss.items()
        }
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
                factor=phase.learning_rate_factor,
            ),
            weight_decay=self.config.optimizer.weight_decay
            if phase.weight_decay is None
            else phase.weight_decay,
            loss_weights={**self.config.loss_weights(), **weights},
            loss_ramps=ramps,
            decoder_only=phase.decoder_only,
            frozen=phase.frozen,
            latents=phase.latents or "sample",
            random_flip=self.config.random_flip() if flip is None else flip,
            activation_checkpointing=phase.activation_checkpointing,
            moments=policy,
            adapters=adapters,
            moment_scale={"keep": 1.0, "reset": 0.0, "decay": decay or 0.0}[policy],
            auto=self._auto(phase, buckets[0]),
        )

    def _auto(self, phase: PhaseConfig, largest: BucketPlan) -> AutoPlan | None:
        rule, adapter = phase.auto_buckets, self.config.curriculum.adapter
        if rule is None:
            return None
        if adapter.reference_global_batch_size is not None:
            self.problems.append(
                f"{self.where}.buckets: auto gives buckets batches of their own, which lr_scaling: "
                f"{adapter.lr_scaling} cannot scale for. List the buckets or use lr_scaling: none."
            )
        # A given micro-batch is of any size; else it follows from the global batch, which must stay a
        # multiple of itself, so that the data comes in the same order on another number of ranks.
        given = phase.micro_batch_size is not None
        step = largest.global_batch_size // (largest.micro_batch_size if given else 1)
        return AutoPlan(rule=rule, largest=largest, batch_step=step, strides=self.strides)

    def _bucket(self, phase: PhaseConfig, bucket: BucketConfig, where: str) -> BucketPlan | None:
        resolution = bucket.resolution or _WITHOUT_PICTURE
        self._check_resolution(resolution, where)
        rate_hz = bucket.duration.frame_rate_hz or self.config.clip_rate_hz()
        requested = self._requested_frames(bucket.duration, rate_hz, where)
        triple = self._batch(phase, bucket, where)
        if requested is None or triple is None:
            return None
        return BucketPlan(
            frames=self._snapped(requested, bucket.duration, where),
            requested_frames=requested,
            height=resolution.height,
            width=resolution.width,
            frame_rate_hz=rate_hz,
            global_batch_size=triple.global_batch_size,
            micro_batch_size=triple.micro_batch_size,
            accumulation=triple.accumulation,
            share=bucket.share,
        )

    def _check_resolution(self, resolution: PhaseResolution, where: str) -> None:
        stride = self.strides.spatial
        for name, size in (("height", resolution.height), ("width", resolution.width)):
            if size % stride:
                below, above = size // stride * stride, (size // stride + 1) * stride
                nearest = f"{below} or {above}" if below else str(above)
                self.problems.append(
                    f"{where}.resolution.{name}: must be a multiple of the model's stride {stride}, got "
                    f"{size}. Use {nearest}."
                )

    def _requested_frames(self, duration: PhaseDuration, rate_hz: float | None, where: str) -> int | None:
        if duration.seconds is None:
            return duration.frames
        if rate_hz is None:
            self.problems.append(
                f"{where}.duration.seconds: needs a rate for video, got {duration.seconds:g} without one. "
                "Add frame_rate_hz or write frames."
            )
            return None
        return max(1, round(duration.seconds * rate_hz))

    def _snapped(self, requested: int, duration: PhaseDuration, where: str) -> int:
        snapped = self.strides.snap(requested)
        if snapped != requested and self.config.curriculum.frames_policy == "strict":
            key = "frames" if duration.seconds is None else "seconds"
            nearest = [str(frames) for frames in (snapped - self.strides.temporal, snapped) if frames > 0]
            self.problems.append(
                f"{where}.duration.{key}: must give {self.strides.rule} for this model (frames_policy: "
                "strict), "
                f"got {requested}. Use {' or '.join(nearest)}, or frames_policy: snap."
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
                f"global_batch_size: must stay whole after batch_scaling * {self.world_size} / "
                f"{adapter.reference_world_size}, "
                f"got {global_batch_size}. Use a multiple of {adapter.reference_world_size}."
            )
        return product // adapter.reference_world_size

    def _rate_scale(self, buckets: tuple[BucketPlan, ...]) -> float:
        adapter = self.config.curriculum.adapter
        sizes = sorted({bucket.global_batch_size for bucket in buckets})
        if adapter.reference_global_batch_size is not None and len(sizes) > 1:
            self.problems.append(
                f"{self.where}.buckets: must have one global batch size with lr_scaling: "
                f"{adapter.lr_scaling}, got {sizes}. "
                "Make them equal or use lr_scaling: none."
            )
        return rate_scale(adapter, sizes[0])


def snap_notes(plan: RunPlan, strides: ModelStrides) -> tuple[str, ...]:
    """Returns one sentence for every bucket that has other frames than the configuration asked for."""
    return tuple(
        f"phase {phase.name}: {bucket.unit} {bucket.requested_frames:,} -> {bucket.frames:,} (the model "
        f"takes {strides.rule})"
        for phase in plan.phases
        for bucket in phase.buckets
        if bucket.frames != bucket.requested_frames
    )


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
