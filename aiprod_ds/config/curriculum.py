"""What a curriculum may say: phases with their own resolution, duration, batch and learning rate.

Owns the schema and the rules inside one phase; rules that need the data, the model or the world size are in
`aiprod_ds.curriculum.plan`. Field names are the YAML keys.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.model import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, StrictModel

_RESOLUTION = re.compile(r"^(\d+)x(\d+)$")


class CurriculumPhase(str, Enum):
    """Names of the default phases; a configuration may use names of its own."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class PhaseResolution(StrictModel):
    """Frame size in pixels; YAML may write it as `256x256` (height x width)."""

    height: PositiveInt
    width: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        match = _RESOLUTION.match(value) if isinstance(value, str) else None
        return {"height": int(match[1]), "width": int(match[2])} if match else value


class PhaseDuration(StrictModel):
    """Length of a clip: `frames` at `frame_rate_hz` (null: the clip's own rate)."""

    frames: PositiveInt
    frame_rate_hz: PositiveFloat | None = None


class PhaseConfig(StrictModel):
    """One phase. The batch is given by any two of its three numbers; the third follows from the world size."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    resolution: PhaseResolution
    duration: PhaseDuration
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    accumulation: PositiveInt | None = None
    updates: PositiveInt
    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_updates: NonNegativeInt = 0
    final_learning_rate_ratio: Fraction = 0.1

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.warmup_updates >= self.updates:
            raise ValueError(
                f"updates: must exceed warmup_updates ({self.warmup_updates}), got {self.updates}. Raise updates or lower warmup_updates."
            )
        if self.global_batch_size is None and self.micro_batch_size is None:
            raise ValueError("global_batch_size: this or micro_batch_size must be given. Set one of them.")
        return self


class CurriculumConfig(StrictModel):
    """The phases in the order they run, and how frame counts that the VAE cannot take are treated."""

    phases: tuple[PhaseConfig, ...] = Field(min_length=1, strict=False)
    frames_policy: Literal["snap", "strict"] = "snap"

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [phase.name for phase in self.phases]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"phases[{index}].name: must be unique, got {name!r} twice. Rename one of them.")
        return self
