"""A phase as it will run: every derived number in one frozen record.

`aiprod_ds.curriculum.plan` makes these from the configuration, the model's strides, the data and the world
size; the loop, the sampler, the planner's table and the report read them. Nobody else solves a batch triple
or snaps a frame count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.phase import AutoBuckets, MomentsPolicy, PlateauConfig, TrainingMode, WeightRamp
from aiprod_ds.curriculum.lr import LearningRateSchedule
from aiprod_ds.curriculum.strides import ModelStrides


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketPlan:
    """Clips of one shape and their batch: `global_batch_size = micro_batch_size * accumulation * world_size`.

    A clip of sound has samples in place of frames and a picture of 1x1.

    Attributes:
        frames: Frames per clip after snapping to what the model takes; of sound, samples of each channel.
        requested_frames: Frames that the configuration asked for.
        frame_rate_hz: Rate to which clips are resampled; None keeps each clip's own. Of sound, the sample
            rate.
        share: Fraction of the phase's updates; None when every clip goes to the bucket that fits it best.
    """

    frames: int
    requested_frames: int
    height: int
    width: int
    frame_rate_hz: float | None
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    share: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether clips have no picture."""
        return self.height == self.width == 1

    @property
    def unit(self) -> str:
        """What is counted along time: `frames` or `samples`."""
        return "samples" if self.is_sound else "frames"

    @property
    def pixels_per_update(self) -> int:
        """Pixels of all frames of all clips of one update over all ranks; of sound, samples of each
        channel."""
        return self.global_batch_size * self.frames * self.height * self.width

    @property
    def length_text(self) -> str:
        """The length in words: `17 frames`, or `65,536 samples (1.49 s)`."""
        seconds = (
            f" ({self.frames / self.frame_rate_hz:.2f} s)"
            if self.is_sound and self.frame_rate_hz is not None
            else ""
        )
        return f"{self.frames:,} {self.unit}{seconds}"

    @property
    def shape_text(self) -> str:
        """The shape and batch in words, for people: `17 frames 64x96, batch 4`."""
        size = "" if self.is_sound else f" {self.height}x{self.width}"
        return f"{self.length_text}{size}, batch {self.global_batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoPlan:
    """That a phase gets its buckets from the clips; see `aiprod_ds.curriculum.auto_buckets`.

    Attributes:
        rule: As configured.
        largest: The phase's own resolution, length and batch, which bound what is found.
        batch_step: Of a global batch: multiples of it are micro-batches of whole clips on every rank.
        strides: Of the model.
    """

    rule: AutoBuckets
    largest: BucketPlan
    batch_step: int
    strides: ModelStrides

    @property
    def key(self) -> str:
        """What decides the shapes beside the clips, in words."""
        largest = self.largest
        rate = "" if largest.frame_rate_hz is None else f" at {largest.frame_rate_hz!r} Hz"
        size = f"{largest.frames}x{largest.height}x{largest.width}{rate}"
        return f"{size}, most {self.rule.most}, min_frames {self.rule.min_frames}"

    def bucket(self, frames: int, height: int, width: int) -> BucketPlan:
        """Returns the bucket of that shape, with the batch of the largest one."""
        return replace(self.largest, frames=frames, requested_frames=frames, height=height, width=width)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRange:
    """A number of updates that is known only within bounds.

    Attributes:
        maximum: None when nothing bounds it before the data is known.
    """

    minimum: int
    maximum: int | None

    @property
    def exact(self) -> int | None:
        """The number when both bounds agree, otherwise None."""
        return self.minimum if self.minimum == self.maximum else None

    def __add__(self, other: UpdateRange) -> UpdateRange:
        """Returns the range of the sum of both numbers."""
        bounded = self.maximum is not None and other.maximum is not None
        maximum = (self.maximum or 0) + (other.maximum or 0) if bounded else None
        return UpdateRange(minimum=self.minimum + other.minimum, maximum=maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnd:
    """What ends a phase; the first that fires.

    Attributes:
        limit_updates: Length that is never exceeded; None when only epochs end the phase.
        minimum_updates: Neither epochs nor plateau end the phase before this length.
        epochs: Completed passes over the phase's data that end it.
    """

    limit_updates: int | None
    minimum_updates: int = 1
    epochs: int | None = None
    plateau: PlateauConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """One phase with everything it sets; nothing is left to look up in the configuration.

    Attributes:
        first: Range of the run's update count when the phase begins.
        length: Range of the number of its updates.
        weight_decay: Of the parameter groups that are decayed.
        loss_weights: Every weight of the trainer's loss, by its configuration name (`perceptual_weight`); of
            one that moves the most.
        random_flip: Whether clips are mirrored at random.
        activation_checkpointing: On or off; None as the engine's settings say.
        moments: What happens to the optimizer's moments when the phase begins; `keep` in the first.
        moment_scale: Factor for both moments at the beginning: 1 keep, 0 reset, otherwise the configured
            decay.
        adapters: What is trained in place of the weights; None if the weights themselves are.
        auto: How `buckets` are found from the clips; before they are, `buckets` is the largest shape alone.
            None if they are configured.
        loss_ramps: The weights that move inside the phase.
        decoder_only: Whether nothing is trained that latents depend on.
        frozen: Names and patterns of what else is not trained.
        latents: What the decoder gets where latents stay what they are; else a draw in any case.
        recompute_every: What `performance.recompute` or `engine.parallel: auto` makes of
            `activation_checkpointing`: 0 nothing, 1 every block, n every n-th; None while they say nothing.
    """

    index: int
    name: str
    buckets: tuple[BucketPlan, ...]
    first: UpdateRange
    length: UpdateRange
    end: PhaseEnd
    learning_rate: LearningRateSchedule
    weight_decay: float
    loss_weights: Mapping[str, float]
    random_flip: bool
    activation_checkpointing: bool | None
    moments: MomentsPolicy
    moment_scale: float
    adapters: LoraConfig | None = None
    auto: AutoPlan | None = None
    loss_ramps: Mapping[str, WeightRamp] = field(default_factory=dict)
    decoder_only: bool = False
    frozen: tuple[str, ...] = ()
    latents: Literal["sample", "mode"] = "sample"
    recompute_every: int | None = None

    def weights_at(self, position: int) -> dict[str, float]:
        """Returns every weight of the loss in an update of the phase.

        Args:
            position: Of the update's global batch in the data of the phase, counted from 0.
        """
        moving = {name: ramp.at(position) for name, ramp in self.loss_ramps.items()}
        return {**self.loss_weights, **moving}

    def recompute(self, *, default: bool) -> int:
        """Returns of how many blocks one is computed again in the backward pass; 0 if none is.

        Args:
            default: Whether blocks are if the phase says nothing: as the engine's settings have it.
        """
        if self.recompute_every is not None:
            return self.recompute_every
        return int(default if self.activation_checkpointing is None else self.activation_checkpointing)

    def trains_as(self, other: PhasePlan) -> bool:
        """Returns whether both phases train the same parameters."""
        mine, others = ((each.adapters, each.decoder_only, each.frozen) for each in (self, other))
        return mine == others

    @property
    def training_mode(self) -> TrainingMode:
        """Whether the weights or adapters are trained."""
        return "full" if self.adapters is None else "lora"

    @property
    def first_update(self) -> int | None:
        """The run's update count when the phase begins; None when a phase before it has an open length."""
        return self.first.exact

    @property
    def updates(self) -> int | None:
        """The phase's length; None when the data or the loss decides it."""
        return self.length.exact


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The whole curriculum for one world size."""

    phases: tuple[PhasePlan, ...]
    world_size: int

    @property
    def total(self) -> UpdateRange:
        """Range of the number of updates of all phases together."""
        return self.phases[-1].first + self.phases[-1].length

    @property
    def total_updates(self) -> int | None:
        """Updates of all phases together; None when the data or the loss decides it."""
        return self.total.exact
