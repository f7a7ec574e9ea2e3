"""What a curriculum may say: its phases, and how they are laid over a trainer's own configuration.

Owns the schema and the rules between phases; `phase` has those inside one, `aiprod_ds.curriculum.plan` those
that need the data, the model or the world size. Field names are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from aiprod_ds.config.phase import (
    BucketConfig,
    MomentsPolicy,
    PhaseAugment,
    PhaseConfig,
    PhaseDuration,
    PhaseResolution,
    PlateauConfig,
)
from aiprod_ds.config.problems.rules import rule
from aiprod_ds.config.schema import Fraction, PositiveInt, StrictModel

__all__ = [
    "BucketConfig",
    "CurriculumAdapterConfig",
    "CurriculumConfig",
    "CurriculumPhase",
    "MomentsPolicy",
    "PhaseAugment",
    "PhaseConfig",
    "PhaseDuration",
    "PhaseResolution",
    "PlateauConfig",
    "default_phases",
    "expand_preset",
]

PhaseOverride = Literal["weight_decay", "loss", "augment", "activation_checkpointing"]
_OVERRIDABLE: tuple[PhaseOverride, ...] = get_args(PhaseOverride)


class CurriculumPhase(str, Enum):
    """Names of the default phases; a configuration may use names of its own."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class CurriculumAdapterConfig(StrictModel):
    """How the phases are laid over a trainer's own configuration."""

    overrides: tuple[PhaseOverride, ...] = Field(default=_OVERRIDABLE, strict=False)
    """Which of these four keys phases may set; a phase that sets another of the four is refused."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiplies every learning rate by global batch / `reference_global_batch_size`, or by the square root
    of that."""
    reference_global_batch_size: PositiveInt | None = None
    """The batch that the learning rates were chosen for, in clips. Goes with `lr_scaling`."""
    batch_scaling: Literal["none", "world_size"] = "none"
    """`world_size` multiplies every global batch by world size / `reference_world_size`."""
    reference_world_size: PositiveInt | None = None
    """The number of ranks that the global batches were chosen for. Goes with `batch_scaling`."""
    moments: MomentsPolicy = "keep"
    """What happens to the optimizer's moments at the start of every phase that does not say it itself; not of
    the first."""
    moment_decay: Fraction | None = None
    """Factor for both moments under `moments: decay`, and only there."""

    @rule
    def _pairs(self) -> Iterator[str]:
        if (self.reference_global_batch_size is not None) != (self.lr_scaling != "none"):
            yield (
                f"reference_global_batch_size: goes with lr_scaling, got {self.reference_global_batch_size} "
                "and "
                f"lr_scaling: {self.lr_scaling}. Set both or neither."
            )
        if (self.reference_world_size is not None) != (self.batch_scaling != "none"):
            yield (
                f"reference_world_size: goes with batch_scaling, got {self.reference_world_size} and "
                f"batch_scaling: {self.batch_scaling}. Set both or neither."
            )
        if (self.moment_decay is not None) != (self.moments == "decay"):
            yield (
                f"moment_decay: goes with moments: decay, got moments: {self.moments}. Set both or neither."
            )


def default_phases() -> tuple[PhaseConfig, ...]:
    """Returns the three phases of `preset: default`: 256x256 to 1024x1024 pixels over 300,000 updates.

    `micro_batch_size` is per rank, so one update sees 16 clips a rank in every phase.
    """
    rows: tuple[tuple[CurriculumPhase, int, int, int, float, int, int, int], ...] = (
        (CurriculumPhase.LOW, 256, 8, 16, 1e-4, 50_000, 1_000, 1),
        (CurriculumPhase.MEDIUM, 512, 16, 8, 5e-5, 100_000, 500, 2),
        (CurriculumPhase.HIGH, 1024, 49, 4, 2e-5, 150_000, 500, 4),
    )
    return tuple(
        PhaseConfig(
            name=name.value,
            resolution=PhaseResolution(height=side, width=side),
            duration=PhaseDuration(frames=frames),
            micro_batch_size=batch,
            accumulation=accumulation,
            updates=updates,
            learning_rate=rate,
            warmup_updates=warmup,
        )
        for name, side, frames, batch, rate, updates, warmup, accumulation in rows
    )


def expand_preset(curriculum: Any) -> Any:
    """Returns the mapping `curriculum` with `preset: default` replaced by its phases; anything else as it is.

    `load` calls it before `--set` is applied, so that `curriculum.phases[2].updates` exists.

    Raises:
        ValueError: If the preset is unknown or stands beside phases.
    """
    if not isinstance(curriculum, dict) or "preset" not in curriculum:
        return curriculum
    if curriculum["preset"] != "default":
        raise ValueError(
            f"preset: must be 'default', got {curriculum['preset']!r}. Write default or list phases."
        )
    if "phases" in curriculum:
        raise ValueError("preset: cannot stand beside phases, got both. Remove one of the two.")
    rest = {key: value for key, value in curriculum.items() if key != "preset"}
    return {
        "phases": [phase.model_dump(mode="json", exclude_unset=True) for phase in default_phases()],
        **rest,
    }


class CurriculumConfig(StrictModel):
    """The phases in the order they run, and how frame counts that the VAE cannot take are treated."""

    phases: tuple[PhaseConfig, ...] = Field(default_factory=default_phases, strict=False)
    """In the order they run; names are unique. Without it: the phases of `preset: default`."""
    frames_policy: Literal["snap", "strict"] = "snap"
    """A frame count that the model cannot take: `snap` rounds it up and the report says so, `strict` is an
    error."""
    adapter: CurriculumAdapterConfig = CurriculumAdapterConfig()
    """Rules that hold for all phases."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return expand_preset(value)

    @rule
    def _each_is_one_of_its_kind(self) -> Iterator[str]:
        names = [phase.name for phase in self.phases]
        for index, phase in enumerate(self.phases):
            if phase.name in names[:index]:
                yield f"phases[{index}].name: must be unique, got {phase.name!r} twice. Rename one of them."
            for key in sorted(phase.model_fields_set & (set(_OVERRIDABLE) - set(self.adapter.overrides))):
                yield (
                    f"phases[{index}].{key}: has no effect, got a value while adapter.overrides lacks it. "
                    "Remove it."
                )
        if not self.phases:
            yield "phases: must have at least one entry, got an empty list. Add a phase."
        elif self.phases[0].moments is not None:
            yield "phases[0].moments: has no effect in the first phase, got a value. Remove it."
