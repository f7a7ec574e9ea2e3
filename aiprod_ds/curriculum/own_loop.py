"""A curriculum for a loop that is not ours: its plan from the configuration alone, and what a phase asks of
that loop.

Called by `scheduler`, of which a plain loop asks when phases end. The trainers plan with the model's strides
and the clips and do not come here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aiprod_ds.clock import Clock
from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.diffusion import adapters_of
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.phase import PhaseConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.epochs import with_epoch_lengths
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, PlanError

_ANY_SIZE = ModelStrides(spatial=1, temporal=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseInfo:
    """What the next update of a plain loop is to be.

    Attributes:
        index: Of the phase, from 0.
        name: Of the phase.
        height: Pixels; 1 for sound. Of the first bucket, as all down to `global_batch_size`.
        width: Pixels; 1 for sound.
        frames: Frames of a clip; of sound, samples.
        frame_rate_hz: None if each clip keeps its own.
        micro_batch_size: Clips of one forward and backward pass on one rank.
        accumulation: Passes of one update.
        global_batch_size: Clips of one update over all ranks.
        buckets: All shapes of the phase with their batches.
        learning_rate: Of the next update.
        weight_decay: Of what is decayed.
        loss_weights: Of the next update, by their configuration names; of a curriculum without its trainer's
            configuration those that the phase sets.
        adapters: What is trained in place of the weights; None if the weights themselves are.
        decoder_only: Whether nothing of a VAE is trained that latents depend on.
        frozen: Names and patterns of what else is not trained.
        moment_scale: Factor for both of the optimizer's moments at the beginning of the phase: 1 keeps them.
        phase_updates: Updates of the phase so far.
        phase_length: Updates of the phase, or the most of them; None if nothing bounds them.
        updates: Updates of all phases so far.
        is_finished: Whether the last phase is over; the rest is then of its last update.
    """

    index: int
    name: str
    height: int
    width: int
    frames: int
    frame_rate_hz: float | None
    micro_batch_size: int
    accumulation: int
    global_batch_size: int
    buckets: tuple[BucketPlan, ...]
    learning_rate: float
    weight_decay: float
    loss_weights: Mapping[str, float]
    adapters: LoraConfig | None
    decoder_only: bool
    frozen: tuple[str, ...]
    moment_scale: float
    phase_updates: int
    phase_length: int | None
    updates: int
    is_finished: bool

    @classmethod
    def of(cls, phase: PhasePlan, clock: Clock, *, is_finished: bool) -> PhaseInfo:
        """Returns what `phase` asks of the update that comes at `clock`."""
        first = phase.buckets[0]
        return cls(
            index=phase.index,
            name=phase.name,
            height=first.height,
            width=first.width,
            frames=first.frames,
            frame_rate_hz=first.frame_rate_hz,
            micro_batch_size=first.micro_batch_size,
            accumulation=first.accumulation,
            global_batch_size=first.global_batch_size,
            buckets=phase.buckets,
            learning_rate=phase.learning_rate.at(clock.phase_updates - is_finished),
            weight_decay=phase.weight_decay,
            loss_weights=phase.weights_at(clock.phase_position - is_finished),
            adapters=phase.adapters,
            decoder_only=phase.decoder_only,
            frozen=phase.frozen,
            moment_scale=phase.moment_scale,
            phase_updates=clock.phase_updates,
            phase_length=phase.length.maximum,
            updates=clock.updates,
            is_finished=is_finished,
        )


def own_loop_plan(
    config: RunConfig | CurriculumConfig,
    *,
    world_size: int,
    strides: ModelStrides | None,
    num_clips: int | None,
) -> RunPlan:
    """Returns the phases of `config` for a loop that is not ours.

    Args:
        config: A trainer's configuration, or its curriculum alone.
        world_size: Ranks that share each global batch.
        strides: Of the model. None: it takes any size and length.
        num_clips: Clips of one pass over the data; needed where epochs end a phase.

    Raises:
        ConfigError: If `config` is something else.
        PlanError: With every problem of the plan.
    """
    if isinstance(config, CurriculumConfig):
        # Nothing of a curriculum alone is checked against a trainer, so it is not validated as one.
        run: RunConfig = _AnyTrainer.model_construct(trainer="own loop", curriculum=config)
    elif isinstance(config, RunConfig):
        run = config
    else:
        raise ConfigError(
            "CurriculumScheduler.from_config: config must be a CurriculumConfig or a trainer's "
            f"configuration, got {type(config).__name__}. Use load_config to read a file."
        )
    plan = plan_run(run, world_size=world_size, strides=strides or _ANY_SIZE)
    by_epochs = [phase for phase in plan.phases if phase.end.epochs is not None]
    if by_epochs and num_clips is None:
        raise PlanError(
            f"configuration: curriculum.phases[{by_epochs[0].index}].epochs: needs num_clips, got none. Pass "
            "the number of clips of one pass over the data."
        )
    automatic = [phase for phase in plan.phases if phase.auto is not None]
    if automatic:
        raise PlanError(
            f"configuration: curriculum.phases[{automatic[0].index}].buckets: must be listed for a loop of "
            "your own, got auto. Only the trainers look at the clips."
        )
    lengths = {phase.index: updates_of_epochs(phase, num_clips or 0) for phase in by_epochs}
    return with_epoch_lengths(plan, lengths)


def updates_of_epochs(phase: PhasePlan, num_clips: int) -> int:
    """Returns the updates after which all epochs of `phase` are over; its first bucket's batch counts.

    Worked number: 2 epochs of 10 clips in batches of 4 are over after 5 updates.
    """
    return max(1, math.ceil((phase.end.epochs or 0) * num_clips / phase.buckets[0].global_batch_size))


class _AnyTrainer(RunConfig):
    """What a plan asks of a trainer's configuration, where there is none."""

    def phase_adapters(self, phase: PhaseConfig) -> LoraConfig | None:
        """Returns the adapters that the phase names itself."""
        return adapters_of(phase, training_mode="full", lora=None)

    def loss_weights(self) -> dict[str, float]:
        """Returns none: the loop knows them."""
        return {}

    def random_flip(self) -> bool:
        """Returns False: augmentation is the loop's."""
        return False

    def clip_rate_hz(self) -> float | None:
        """Returns None: every clip has its own."""
        return None
