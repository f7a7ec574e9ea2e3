"""What a run has decided to leave out: the stretches of data behind its spikes, as part of where it stands.

Owns the record of a rollback, the file `rollbacks.json` of the run folder, and three questions: whether the
update at a clock is left out, whether a checkpoint is on the way that was decided for, and how many stretches
lie behind a clock. A decision stands in the file before anything follows from it, and in every checkpoint
that is saved after it; so a run that is killed at any moment goes on as one that is not.

An update that is left out counts as one whose gradient was not finite: data moves on, training time does not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aiprod_ds.checkpoint.disk import explained
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError
from aiprod_ds.files import read_whole, sync, write_atomically
from aiprod_ds.train.spikes.detector import Spike

FILE = "rollbacks.json"
_FORMAT = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """One decision.

    Attributes:
        spike: Whose data is left out, from its first position to its last.
        checkpoint: Name of the one that the run went back to; None: to its beginning.
        learning_rate_factor: Of the phase, then.
        clips: That are left out, by name, the first ones of many; empty where nobody knows.
        num_clips: How many there are.
    """

    spike: Spike
    checkpoint: str | None
    learning_rate_factor: float = 1.0
    clips: tuple[str, ...] = ()
    num_clips: int = 0

    @property
    def window(self) -> tuple[int, int, int]:
        """Phase, first and last position: what decides how training goes on."""
        return self.spike.phase, self.spike.first, self.spike.last

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return asdict(self)


_ROLLBACKS = TypeAdapter(tuple[Rollback, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollbacks:
    """All decisions of the way that a run is on, oldest first."""

    decided: tuple[Rollback, ...] = ()

    def leaves_out(self, clock: Clock) -> bool:
        """Returns whether the update at `clock` is left out."""
        at = clock.phase_position
        return any(
            phase == clock.phase and first <= at <= last
            for phase, first, last in (rollback.window for rollback in self.decided)
        )

    def num_behind(self, clock: Clock) -> int:
        """Returns how many stretches lie behind `clock`: the rollbacks of the way up to there."""
        moment = (clock.phase, clock.phase_position)
        return sum((phase, last) < moment for phase, _, last in (entry.window for entry in self.decided))

    def has_way_of(self, state: RunState) -> bool:
        """Returns whether a checkpoint's run goes on as decided: every decision that it does not know of yet
        begins after it."""
        own = of_state(state)
        if not self._begins_with(own):
            return True  # the file is of another way, and the checkpoint says for itself
        moment = (state.clock.phase, state.clock.phase_position)
        return all(moment <= entry.window[:2] for entry in self.decided[len(own.decided) :])

    def from_checkpoint(self, state: RunState) -> Rollbacks:
        """Returns the decisions of a run that goes on from a checkpoint: these, or its own if it is on
        another way."""
        own = of_state(state)
        if self._begins_with(own) and self.has_way_of(state):
            return self
        if self.decided != own.decided:
            _LOG.warning(
                "rollbacks_dropped known=%d of_checkpoint=%d: the checkpoint is on another way than %s",
                len(self.decided), len(own.decided), FILE,
            )  # fmt: skip
        return own

    def plus(self, rollback: Rollback) -> Rollbacks:
        """Returns these and one more."""
        return Rollbacks(decided=(*self.decided, rollback))

    def to_list(self) -> list[dict[str, Any]]:
        """Returns them JSON-ready."""
        return [entry.to_dict() for entry in self.decided]

    def write(self, folder: Path, *, stopped_by: Rollback | None = None) -> None:
        """Writes the file of the run folder, which is on the disk when this returns.

        Args:
            folder: Of the run.
            stopped_by: What was not decided because the run stopped, for its user.

        Raises:
            DiskFullError: If there is no room.
            CheckpointError: If the disk fails.
        """
        values = {"format": _FORMAT, "rollbacks": self.to_list()}
        if stopped_by is not None:
            values["stopped_by"] = stopped_by.to_dict()
        with explained(folder):
            write_atomically(folder / FILE, json.dumps(values, indent=1, allow_nan=False) + "\n")
            sync(folder)

    def _begins_with(self, other: Rollbacks) -> bool:
        own, known = _windows(self), _windows(other)
        return own[: len(known)] == known


def read_rollbacks(folder: Path) -> Rollbacks:
    """Returns the decisions in a run folder; none without a file.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / FILE
    try:
        values = json.loads(read_whole(path))
        if values["format"] != _FORMAT:
            raise ValueError(f"format {values['format']}")  # noqa: TRY301  told as any other damage
        return Rollbacks(decided=_of(values["rollbacks"]))
    except FileNotFoundError:
        return Rollbacks()
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: must hold the run's rollbacks in format {_FORMAT}, got {str(error)[:200]}. Remove it: "
            "the run then goes on with those that its checkpoint knows."
        ) from error


def of_state(state: RunState) -> Rollbacks:
    """Returns the decisions that a checkpoint knows.

    Raises:
        CheckpointError: If they are damaged.
    """
    try:
        return Rollbacks(decided=_of(state.spikes.get("rollbacks", [])))
    except ValidationError as error:
        raise CheckpointError(
            f"spikes.rollbacks: must be what a run saves, got {str(error)[:200]}. The checkpoint is damaged."
        ) from error


def _of(values: Sequence[Mapping[str, Any]]) -> tuple[Rollback, ...]:
    return _ROLLBACKS.validate_python(values)


def _windows(rollbacks: Rollbacks) -> list[tuple[int, int, int]]:
    return [entry.window for entry in rollbacks.decided]
