"""What one phase may say: shape, batch, end, learning rate and what it overrides. Field names are the YAML
keys.

Owns the schema and the rules inside a phase; `curriculum` puts phases together, `aiprod_ds.curriculum.plan`
knows the data, the model and the world size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)

_RESOLUTION = re.compile(r"^(\d+)x(\d+)$")

MomentsPolicy = Literal["keep", "reset", "decay"]
TrainingMode = Literal["full", "lora"]


class PhaseResolution(StrictModel):
    """Frame size in pixels; YAML may write it as `256x256` (height x width)."""

    height: PositiveInt
    """Pixels; a multiple of the model's spatial stride."""
    width: PositiveInt
    """Pixels; a multiple of the model's spatial stride."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        match = _RESOLUTION.match(value) if isinstance(value, str) else None
        if match:
            return {"height": int(match[1]), "width": int(match[2])}
        if not isinstance(value, (dict, cls)):
            raise ValueError(  # noqa: TRY004  pydantic reports ValueError only
                f"must be HEIGHTxWIDTH or a mapping with both, got {value!r}. Write for example 256x256."
            )
        return value


class PhaseDuration(StrictModel):
    """Length of a clip, by `frames` or by `seconds`."""

    frames: PositiveInt | None = None
    """Frames of each clip; 1 is an image. A video model takes 1 + temporal stride * k, an audio model a
    multiple of its hop in samples; see `curriculum.frames_policy`."""
    seconds: PositiveFloat | None = None
    """In place of `frames`: this times the rate, rounded. The rate is `frame_rate_hz`, or for sound
    `data.sample_rate_hz`."""
    frame_rate_hz: PositiveFloat | None = None
    """Rate to which clips are resampled, in frames per second. null: each clip's own. Not for sound."""

    @rule
    def _one_length(self) -> Iterator[str]:
        if (self.frames is None) == (self.seconds is None):
            got = "neither" if self.frames is None else "both"
            yield (
                f"frames: either this or seconds must be given, got {got}. Write for example {{frames: 17}}."
            )


class BucketConfig(StrictModel):
    """Clips of one shape inside a phase.

    A bucket that gives neither `global_batch_size` nor `micro_batch_size` takes both from the phase, and
    `accumulation` unless it has its own; one that gives either takes no batch number from the phase.
    """

    resolution: PhaseResolution | None = None
    """Frame size; text such as `256x256` is height x width. Required for video, not for sound."""
    duration: PhaseDuration
    """Length of the clips."""
    share: Fraction | None = None
    """Fraction of the phase's updates that this bucket gets, above 0: all buckets of a phase have one
    (together 1) or none has, and then every clip goes to the bucket that fits it best."""
    global_batch_size: PositiveInt | None = None
    """Clips per update over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Clips per forward and backward pass on one rank."""
    accumulation: PositiveInt | None = None
    """Micro-batches per update."""


class AutoBuckets(StrictModel):
    """Shapes found from the clips: `buckets: auto`, or with settings `buckets: {most: 4}`.

    The phase's `resolution` and `duration` are then the most that a clip may be, in pixels of a frame and in
    frames, and its batch is that of such clips; see `aiprod_ds.curriculum.auto_buckets` for the exact rule.
    """

    most: Annotated[int, Field(ge=1, le=64)] = 8
    """Shapes at most; fewer where another one would gain less than 1 % of what is seen of the clips."""
    min_frames: PositiveInt = 1
    """Clips with fewer frames are not used, as if a bucket asked for so many. 1: all, images among them. Of
    sound, samples."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"must be auto or a list of shapes, got {value!r}. Write auto or list them.")
        return {} if value == "auto" else value


def _kind_of_buckets(value: Any) -> str:
    return "auto" if isinstance(value, (str, dict, AutoBuckets)) else "listed"


class PlateauConfig(StrictModel):
    """Ends a phase when the smoothed loss stops falling; see `aiprod_ds.curriculum.plateau` for the exact
    rule."""

    patience_updates: PositiveInt
    """Updates without improvement that end the phase."""
    threshold: NonNegativeFloat = 1e-3
    """Relative improvement of the smoothed loss that counts."""
    smoothing: float = Field(default=0.98, ge=0, lt=1)
    """Weight of the past in the exponential mean."""


class PhaseAugment(StrictModel):
    """Augmentations that a phase sets apart from the data section."""

    random_flip: bool | None = None
    """As `data.random_flip`. null: that one."""


class WeightRamp(StrictModel):
    """A weight that moves linearly: in update u of the phase, counted from 0, it is
    `start` + (`end` - `start`) * min(u / `updates`, 1)."""

    start: NonNegativeFloat
    """The weight in the first update of the phase."""
    end: NonNegativeFloat
    """The weight from update number `updates` of the phase on."""
    updates: PositiveInt
    """Updates until it is reached; at most those of the phase. Left-out ones count, as places in the data
    do."""

    def at(self, update: int) -> float:
        """Returns the weight in an update of the phase.

        Worked number: from 0 to 1e-6 over 4 updates: 0, 2.5e-7, 5e-7, 7.5e-7, 1e-6, 1e-6, ...
        """
        return (
            self.end
            if update >= self.updates
            else self.start + (self.end - self.start) * (update / self.updates)
        )


def _kind_of_weight(value: Any) -> str:
    return "ramp" if isinstance(value, (dict, WeightRamp)) else "weight"


LossWeight = Annotated[
    Annotated[NonNegativeFloat, Tag("weight")] | Annotated[WeightRamp, Tag("ramp")],
    Discriminator(_kind_of_weight),
]


class PhaseConfig(StrictModel):
    """One phase. The batch is given by any two of its three numbers; the third follows from the world size.

    Shape: `duration` and for video `resolution`, or `buckets`, or all of them with `buckets: auto`. End:
    `updates` (a fixed length), `epochs` of the phase's own data, `plateau` of the loss, or several of them,
    of which the first that fires ends the phase; `min_updates` and `max_updates` bound the last two. What is
    left out of `weight_decay`, `loss`, `augment` and `activation_checkpointing` stays as the other sections
    say.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    """Stands in the report and in file names; letters, digits, `_` and `-`."""
    resolution: PhaseResolution | None = None
    """Frame size; text such as `256x256` is height x width. Required for video unless there are `buckets`,
    not for sound."""
    duration: PhaseDuration | None = None
    """Length of the clips. Not beside a list of `buckets`."""
    buckets: Annotated[
        Annotated[tuple[BucketConfig, ...], Field(strict=False), Tag("listed")]
        | Annotated[AutoBuckets, Tag("auto")],
        Discriminator(_kind_of_buckets),
    ] = ()
    """Several shapes in one phase; every update has one of them. A list, or `auto` (a mapping with its
    settings): found from the clips, within the phase's `resolution` and `duration`."""
    global_batch_size: PositiveInt | None = None
    """Clips per update over all ranks; this or `micro_batch_size` must be given."""
    micro_batch_size: PositiveInt | None = None
    """Clips per forward and backward pass on one rank."""
    accumulation: PositiveInt | None = None
    """Micro-batches per update. null: it follows from the other two, or is 1 when only one of them is
    given."""
    updates: PositiveInt | None = None
    """The phase's length; alone it is fixed, beside `epochs` or `plateau` it is the longest. Above
    `warmup_updates`."""
    epochs: PositiveInt | None = None
    """Ends the phase after so many passes over its own data."""
    plateau: PlateauConfig | None = None
    """Ends the phase when the loss stops falling; needs `max_updates` or `updates`."""
    min_updates: PositiveInt | None = None
    """Neither `epochs` nor `plateau` ends the phase before this. At most the longest length."""
    max_updates: PositiveInt | None = None
    """The longest length beside `epochs` or `plateau`; not beside `updates`. Above `warmup_updates`."""
    learning_rate: PositiveFloat
    """The highest rate, reached at the end of the warm-up."""
    learning_rate_factor: PositiveFloat = 1.0
    """Of every rate of the phase. Unlike all else it may be changed in a phase that runs: from the resume on
    it counts as it is then."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The rate after the warm-up. `linear` and `cosine` end with the first of `updates`, `max_updates` and
    the epochs."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the rate rises linearly to the highest, counted from the phase's start."""
    final_learning_rate_ratio: Fraction = 0.1
    """The rate of the last update over the highest; no effect with `schedule: constant`, so refused there."""
    weight_decay: NonNegativeFloat | None = None
    """As `optimizer.weight_decay`. null: that one."""
    loss: dict[str, LossWeight] = Field(default_factory=dict)
    """Weights of the loss section by name, e.g. `{perceptual_weight: 0.1}`; the others stay. Of a VAE, a
    weight may move: `{kl_weight: {start: 0.0, end: 1.0e-6, updates: 5000}}`."""
    augment: PhaseAugment = PhaseAugment()
    """Augmentations; what is left out stays as the data section says."""
    activation_checkpointing: bool | None = None
    """On or off in this phase. null: as the DeepSpeed settings say."""
    training_mode: TrainingMode | None = None
    """`full` trains every weight of a diffusion transformer, `lora` adapters. null: as the trainer's own
    section says."""
    lora: LoraConfig | None = None
    """The adapters of this phase, under `lora`. null: the trainer's own section `lora`."""
    decoder_only: bool = False
    """Trains of a VAE only what latents do not depend on, so that latents made before stay valid."""
    frozen: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """Parts of a VAE that are not trained in this phase: names of layers or weights in the model
    (`encoder.conv_in`), or patterns of them with `*`, `?` and `[]`. Each must match something."""
    latents: Literal["sample", "mode"] | None = None
    """What the decoder is trained on where latents stay what they are: draws from the posterior, or its mode.
    null: draws. Only there."""
    moments: MomentsPolicy | None = None
    """The optimizer's moments when the phase begins: kept, set to 0 or multiplied by `moment_decay`. null: as
    the adapter says. Not in the first phase."""
    moment_decay: Fraction | None = None
    """Factor for both moments under `moments: decay`, and only there."""

    @property
    def trained_part(self) -> tuple[bool, tuple[str, ...]]:
        """What of a VAE is trained: `decoder_only` and `frozen`."""
        return self.decoder_only, self.frozen

    @property
    def listed_buckets(self) -> tuple[BucketConfig, ...]:
        """The shapes that are listed; none if there is one, or if they are found from the clips."""
        return () if isinstance(self.buckets, AutoBuckets) else self.buckets

    @property
    def auto_buckets(self) -> AutoBuckets | None:
        """How shapes are found from the clips; None if they are not."""
        return self.buckets if isinstance(self.buckets, AutoBuckets) else None

    @property
    def limit_updates(self) -> int | None:
        """The longest that the phase can be: `updates` or `max_updates`; None when only epochs end it."""
        return self.updates if self.updates is not None else self.max_updates

    @rule
    def _rules(self) -> Iterator[str]:
        yield from _shape_problems(self)
        yield from _end_problems(self)
        yield from _length_problems(self)
        yield from _weight_problems(self)
        if (self.moment_decay is not None) != (self.moments == "decay"):
            yield f"moment_decay: goes with moments: decay, got moments: {self.moments}. Set both or neither."


def _shape_problems(phase: PhaseConfig) -> Iterator[str]:
    buckets = phase.listed_buckets
    for key in ("resolution", "duration"):
        if buckets and getattr(phase, key) is not None:
            yield f"{key}: has no effect beside buckets, got both. Remove one of the two."
    if not buckets and phase.duration is None:
        what = "unless buckets are" if phase.auto_buckets is None else "with buckets: auto"
        yield f"duration: must be given {what}, got nothing. Add `duration:`."
    rule = phase.auto_buckets
    longest = None if phase.duration is None else phase.duration.frames
    if rule is not None and longest is not None and rule.min_frames > longest:
        yield (
            f"buckets.min_frames: must be at most duration.frames ({longest}), got {rule.min_frames}. Lower "
            "it."
        )
    yield from _share_problems(buckets)
    batches: tuple[BucketConfig | PhaseConfig, ...] = buckets or (phase,)
    for index, bucket in enumerate(batches):
        sizes = (
            bucket.global_batch_size,
            bucket.micro_batch_size,
            phase.global_batch_size,
            phase.micro_batch_size,
        )
        if all(size is None for size in sizes):
            where = f"buckets[{index}].global_batch_size" if buckets else "global_batch_size"
            yield f"{where}: this or micro_batch_size must be given, got neither. Set one of them."


def _share_problems(buckets: tuple[BucketConfig, ...]) -> Iterator[str]:
    given = [bucket.share for bucket in buckets if bucket.share is not None]
    if given and len(given) < len(buckets):
        yield (
            f"buckets: must all have a share or none, got {len(given)} of {len(buckets)}. Add or remove "
            "shares."
        )
    elif given and abs(sum(given) - 1.0) > 1e-6:
        yield f"buckets: must have shares that sum to 1, got {sum(given):g}. Correct the shares."
    for index, bucket in enumerate(buckets):
        if bucket.share == 0:
            yield f"buckets[{index}].share: must be above 0, got 0. Remove the bucket."


def _end_problems(phase: PhaseConfig) -> Iterator[str]:
    soft = phase.epochs is not None or phase.plateau is not None
    if phase.updates is None and not soft:
        yield "updates: one of updates, epochs and plateau must be given, got none. Say how the phase ends."
    if phase.updates is not None and phase.max_updates is not None:
        yield f"max_updates: has no effect beside updates, got {phase.max_updates}. Remove one of the two."
    if phase.plateau is not None and phase.limit_updates is None:
        yield (
            "max_updates: must be given with plateau, got nothing. A plateau may never come: set the "
            "longest length."
        )
    if not soft:
        for key in ("min_updates", "max_updates"):
            if getattr(phase, key) is not None:
                yield f"{key}: has no effect without epochs or plateau, got {getattr(phase, key)}. Remove it."


def _length_problems(phase: PhaseConfig) -> Iterator[str]:
    limit = phase.limit_updates
    ratio = phase.final_learning_rate_ratio
    if (
        phase.schedule == "constant"
        and ratio != PhaseConfig.model_fields["final_learning_rate_ratio"].default
    ):
        yield f"final_learning_rate_ratio: has no effect with schedule: constant, got {ratio}. Remove it."
    if limit is None:
        return
    key = "updates" if phase.updates is not None else "max_updates"
    if phase.warmup_updates >= limit:
        yield (
            f"{key}: must exceed warmup_updates ({phase.warmup_updates}), got {limit}. Raise {key} or "
            "lower warmup_updates."
        )
    if phase.min_updates is not None and phase.min_updates > limit:
        yield f"min_updates: must be at most {key} ({limit}), got {phase.min_updates}. Lower it."


def _weight_problems(phase: PhaseConfig) -> Iterator[str]:
    limit, key = phase.limit_updates, "updates" if phase.updates is not None else "max_updates"
    for name, weight in phase.loss.items():
        if not isinstance(weight, WeightRamp):
            continue
        if weight.start == weight.end:
            yield (
                f"loss.{name}.end: must differ from start, got {weight.end:g} for both. Write the weight "
                "alone."
            )
        if limit is not None and weight.updates > limit:
            yield f"loss.{name}.updates: must be at most {key} ({limit}), got {weight.updates}. Lower it."
