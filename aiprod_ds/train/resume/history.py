"""What the report needs from the whole run, also from before a resume: evaluations, seconds per phase,
resumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class History:
    """Grows while the run goes on and travels in every checkpoint.

    Attributes:
        before: Held-out measures before the first update.
        phase_metrics: Phase name -> held-out measures at its end.
        phase_updates: Phase name -> applied updates.
        phase_seconds: Phase name -> training seconds, pauses excluded.
        phase_ends: Phase name -> what ended it: updates, epochs or plateau.
        retrained: `Retraining.to_dict` of every change of the trained parameters.
        resumed_from: Checkpoint names that the run continued from.
        resharded: Those of them that another engine, ZeRO stage or number of ranks had saved, and what
            changed, in words.
        accepted_data: Checkpoints that the run went on from with other data than they had, and what changed,
            in words.
        not_saved: Update and reason of every save that there was no room for.
        replacements: What was done in place of what was asked while the run went on, in words.
        worker_restarts: Starts of the loader's workers after deaths, of all ranks.
        evaluations: Records in the run folder.
        evaluated: Part of an evaluation -> `updates` and `samples` where it was last made.
        measured: `updates` and `metrics` of the last held-out measures.
        best: Rule of `keep_best` -> its best values, at most as many as it keeps.
        rate_factors: Changes of a phase's `learning_rate_factor`, which is 1 before the first: `phase`,
            `update` of the run and `phase_update` after which it counts, and `factor`.
    """

    before: dict[str, float] = field(default_factory=dict)
    phase_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    phase_updates: dict[str, int] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    phase_ends: dict[str, str] = field(default_factory=dict)
    retrained: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: list[str] = field(default_factory=list)
    resharded: list[str] = field(default_factory=list)
    accepted_data: list[str] = field(default_factory=list)
    not_saved: list[dict[str, Any]] = field(default_factory=list)
    replacements: list[str] = field(default_factory=list)
    worker_restarts: int = 0
    evaluations: int = 0
    evaluated: dict[str, dict[str, int]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    best: dict[str, list[float]] = field(default_factory=dict)
    rate_factors: list[dict[str, Any]] = field(default_factory=list)

    def note_rate_factor(self, phase: str, factor: float, clock: Clock) -> None:
        """Remembers, and logs, that a phase's rates are multiplied by another factor from `clock` on."""
        before = next(
            (change["factor"] for change in reversed(self.rate_factors) if change["phase"] == phase), 1.0
        )
        if factor != before:
            _LOG.warning(
                "learning_rate_factor_changed phase=%s update=%d from=%g to=%g",
                phase, clock.updates, before, factor,
            )  # fmt: skip
            moment = {"update": clock.updates, "phase_update": clock.phase_updates}
            self.rate_factors.append({"phase": phase, **moment, "factor": factor})

    def highest_rate_factor(self, phase: str, factor: float) -> float:
        """Returns the highest factor that a phase's rates have had; `factor` if it has not begun."""
        own = [change for change in self.rate_factors if change["phase"] == phase]
        factors: list[float] = [change["factor"] for change in own]
        if own and own[0]["phase_update"]:
            factors.append(1.0)
        return max(factors, default=factor)

    def note_not_saved(self, update: int, reason: str) -> None:
        """Remembers a save that there was no room for."""
        self.not_saved.append({"update": update, "reason": reason})

    def note_replacement(self, words: str) -> None:
        """Remembers, and logs once, what is done in place of what was asked; the first words on
        `subject: details` stand."""
        subject = words.partition(":")[0]
        if not any(known.startswith(subject) for known in self.replacements):
            _LOG.warning("replaced %s", words)
            self.replacements.append(words)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """Returns the history saved by `to_dict`.

        Raises:
            CheckpointError: If it holds anything else.
        """
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        try:
            TypeAdapter(cls).validate_python(dict(values))  # what is kept is what was saved, not a copy of it
        except ValidationError as error:
            first = error.errors()[0]
            unknown.append(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        if unknown:
            raise CheckpointError(
                f"history: must be what a run saves, got {', '.join(unknown)[:200]}. The checkpoint is "
                "damaged."
            )
        return cls(**values)
