"""The clock: the only mutable time of a run, as a frozen record that is replaced at every update.

Learning rate, random streams, data order and EMA decay are functions of (configuration, clock, rank), so
nothing else needs to be saved for them and resume is exact. The loop is the only writer; everyone else reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from aiprod_ds.errors import CheckpointError

_MOST = 10**15  # a count a microsecond for thirty years


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Where a run stands.

    Attributes:
        updates: Applied optimizer updates since the start of the run.
        skipped_updates: Updates that were computed but not applied (fp16 overflow), counted apart.
        micro_batches: Forward and backward passes per rank, skipped updates included.
        samples: Samples seen by all ranks together in applied updates.
        phase: Index of the current curriculum phase.
        phase_updates: Applied updates since this phase began; the learning rate depends on it.
        phase_skipped: Skipped updates since this phase began; they have consumed data.
        epoch: Completed passes over this phase's own data.
    """

    updates: int = 0
    skipped_updates: int = 0
    micro_batches: int = 0
    samples: int = 0
    phase: int = 0
    phase_updates: int = 0
    phase_skipped: int = 0
    epoch: int = 0

    @property
    def phase_position(self) -> int:
        """Global batches of this phase's data stream that are already consumed."""
        return self.phase_updates + self.phase_skipped

    def after_update(self, *, micro_batches: int, samples: int, epoch: int) -> Clock:
        """Returns the clock after one applied update of `micro_batches` per rank and `samples` over all
        ranks."""
        return replace(
            self,
            updates=self.updates + 1,
            micro_batches=self.micro_batches + micro_batches,
            samples=self.samples + samples,
            phase_updates=self.phase_updates + 1,
            epoch=epoch,
        )

    def after_skip(self, *, micro_batches: int, epoch: int) -> Clock:
        """Returns the clock after an update that was not applied: data moved on, training time did not."""
        return replace(
            self,
            skipped_updates=self.skipped_updates + 1,
            micro_batches=self.micro_batches + micro_batches,
            phase_skipped=self.phase_skipped + 1,
            epoch=epoch,
        )

    def at_phase(self, phase: int) -> Clock:
        """Returns the clock at the first moment of `phase`: its own counters are zero, those of the run go
        on."""
        return replace(self, phase=phase, phase_updates=0, phase_skipped=0, epoch=0)

    def to_dict(self) -> dict[str, int]:
        """Returns the fields as a JSON-ready mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Clock:
        """Returns the clock saved by `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown, or no count that a run can reach.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise CheckpointError(
                f"clock: fields must be {sorted(names)}, got {sorted(values)}. The checkpoint is of another "
                "format."
            )
        checked: dict[str, int] = {}
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
                raise CheckpointError(
                    f"clock.{name}: must be an integer from 0 to {_MOST:,}, got {str(value)[:80]!r}. The "
                    "checkpoint is damaged."
                )
            checked[name] = value
        return cls(**checked)
