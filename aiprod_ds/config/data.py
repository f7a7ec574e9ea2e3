"""Where the clips of a run come from, whatever they hold: files, the held-out part, worker processes."""

from __future__ import annotations

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.schema import Fraction, NonNegativeInt, StrictModel


class ClipDataConfig(StrictModel):
    """What every kind of clip needs; a trainer's own data section adds to it."""

    train: str = Field(min_length=1)
    """A folder, searched recursively, or a CSV, JSON or JSONL manifest; relative to the working folder."""
    validation: str | None = None
    """Held-out clips, in the same forms. null: `holdout_fraction` of the training clips."""
    holdout_fraction: Fraction = 0.1
    """Share of the clips that is held out, at least one; chosen by the seed and the files' content. Not beside `validation`."""
    num_workers: NonNegativeInt = 2
    """Processes per rank that decode ahead; 0 decodes in the training process. No effect on the result."""
    max_unreadable_fraction: Fraction = 0.05
    """Share of files that may be unreadable; above it the run stops before training."""

    @model_validator(mode="after")
    def _holdout_has_effect(self) -> Self:
        # The default value is no choice, so that a resolved configuration, which states every default, loads again.
        if self.validation is not None and self.holdout_fraction != type(self).model_fields["holdout_fraction"].default:
            raise ValueError(
                f"holdout_fraction: has no effect when validation is set, got {self.holdout_fraction}. Remove one of the two."
            )
        return self
