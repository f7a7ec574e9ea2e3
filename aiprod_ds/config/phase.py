"""What one phase may say: shape, batch, end, learning rate and what it overrides. Field names are the YAML keys.

Owns the schema and the rules inside a phase; `curriculum` puts phases together, `aiprod_ds.curriculum.plan` knows the data,
the model and the world size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.model import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StrictModel

_RESOLUTION = re.compile(r"^(\d+)x(\d+)$")

MomentsPolicy = Literal["keep", "reset", "decay"]


class PhaseResolution(StrictModel):
    """Frame size in pixels; YAML may write it as `256x256` (height x width)."""

    height: PositiveInt
    width: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        match = _RESOLUTION.match(value) if isinstance(value, str) else None
        if match:
            return {"height": int(match[1]), "width": int(match[2])}
        if not isinstance(value, (dict, cls)):
            raise ValueError(f"must be HEIGHTxWIDTH or a mapping with both, got {value!r}. Write for example 256x256.")  # noqa: TRY004
        return value


class PhaseDuration(StrictModel):
    """Length of a clip: `frames` at `frame_rate_hz` (null: the clip's own rate). One frame is an image."""

    frames: PositiveInt
    frame_rate_hz: PositiveFloat | None = None


class BucketConfig(StrictModel):
    """Clips of one shape inside a phase; batch numbers left out are those of the phase.

    `share` is the fraction of the phase's updates that this bucket gets: all buckets of a phase have one (together 1) or none
    has, and then every clip goes to the bucket that fits it best.
    """

    resolution: PhaseResolution
    duration: PhaseDuration
    share: Fraction | None = None
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    accumulation: PositiveInt | None = None


class PlateauConfig(StrictModel):
    """Ends a phase when the smoothed loss stops falling; see `aiprod_ds.curriculum.plateau` for the exact rule.

    `smoothing` is the weight of the past in the exponential mean; `threshold` the relative improvement that counts.
    """

    patience_updates: PositiveInt
    threshold: NonNegativeFloat = 1e-3
    smoothing: float = Field(default=0.98, ge=0, lt=1)


class PhaseAugment(StrictModel):
    """Augmentations that a phase sets apart from the data section."""

    random_flip: bool | None = None


class PhaseConfig(StrictModel):
    """One phase. The batch is given by any two of its three numbers; the third follows from the world size.

    Shape: `resolution` and `duration`, or `buckets`. End: `updates` (a fixed length), `epochs` of the phase's own data,
    `plateau` of the loss, or several of them, of which the first that fires ends the phase; `min_updates` and `max_updates`
    bound the last two. What is left out of `weight_decay`, `loss`, `augment` and `activation_checkpointing` stays as the
    other sections say.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    resolution: PhaseResolution | None = None
    duration: PhaseDuration | None = None
    buckets: tuple[BucketConfig, ...] = Field(default=(), strict=False)
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    accumulation: PositiveInt | None = None
    updates: PositiveInt | None = None
    epochs: PositiveInt | None = None
    plateau: PlateauConfig | None = None
    min_updates: PositiveInt | None = None
    max_updates: PositiveInt | None = None
    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_updates: NonNegativeInt = 0
    final_learning_rate_ratio: Fraction = 0.1
    weight_decay: NonNegativeFloat | None = None
    loss: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    augment: PhaseAugment = PhaseAugment()
    activation_checkpointing: bool | None = None
    moments: MomentsPolicy | None = None
    moment_decay: Fraction | None = None

    @property
    def limit_updates(self) -> int | None:
        """The longest that the phase can be: `updates` or `max_updates`; None when only epochs end it."""
        return self.updates if self.updates is not None else self.max_updates

    @model_validator(mode="after")
    def _rules(self) -> Self:
        problems = [*_shape_problems(self), *_end_problems(self), *_length_problems(self)]
        if (self.moment_decay is not None) != (self.moments == "decay"):
            problems.append(f"moment_decay: goes with moments: decay, got moments: {self.moments}. Set both or neither.")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _shape_problems(phase: PhaseConfig) -> Iterator[str]:
    for key in ("resolution", "duration"):
        if phase.buckets and getattr(phase, key) is not None:
            yield f"{key}: has no effect beside buckets, got both. Remove one of the two."
        if not phase.buckets and getattr(phase, key) is None:
            yield f"{key}: must be given unless buckets are, got nothing. Add `{key}:`."
    yield from _share_problems(phase.buckets)
    batches: tuple[BucketConfig | PhaseConfig, ...] = phase.buckets or (phase,)
    for index, bucket in enumerate(batches):
        sizes = (bucket.global_batch_size, bucket.micro_batch_size, phase.global_batch_size, phase.micro_batch_size)
        if all(size is None for size in sizes):
            where = f"buckets[{index}].global_batch_size" if phase.buckets else "global_batch_size"
            yield f"{where}: this or micro_batch_size must be given, got neither. Set one of them."


def _share_problems(buckets: tuple[BucketConfig, ...]) -> Iterator[str]:
    given = [bucket.share for bucket in buckets if bucket.share is not None]
    if given and len(given) < len(buckets):
        yield f"buckets: must all have a share or none, got {len(given)} of {len(buckets)}. Add or remove shares."
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
        yield "max_updates: must be given with plateau, got nothing. A plateau may never come: set the longest length."
    if not soft:
        for key in ("min_updates", "max_updates"):
            if getattr(phase, key) is not None:
                yield f"{key}: has no effect without epochs or plateau, got {getattr(phase, key)}. Remove it."


def _length_problems(phase: PhaseConfig) -> Iterator[str]:
    limit = phase.limit_updates
    ratio = phase.final_learning_rate_ratio
    if phase.schedule == "constant" and ratio != PhaseConfig.model_fields["final_learning_rate_ratio"].default:
        yield f"final_learning_rate_ratio: has no effect with schedule: constant, got {ratio}. Remove it."
    if phase.schedule != "constant" and limit is None:
        yield (
            f"schedule: {phase.schedule} needs a known length, got a phase ended by epochs alone. "
            "Set max_updates or use schedule: constant."
        )
    if limit is None:
        return
    key = "updates" if phase.updates is not None else "max_updates"
    if phase.warmup_updates >= limit:
        yield (f"{key}: must exceed warmup_updates ({phase.warmup_updates}), got {limit}. Raise {key} or lower warmup_updates.")
    if phase.min_updates is not None and phase.min_updates > limit:
        yield f"min_updates: must be at most {key} ({limit}), got {phase.min_updates}. Lower it."
