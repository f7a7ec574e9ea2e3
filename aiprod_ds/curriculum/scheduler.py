"""When a phase is over: by updates, by epochs or by a loss plateau, whichever comes first.

The trainers' loop asks `decision(clock)` before each update and reports each update with `observe`; it moves
the clock itself. A plain loop has no clock: a scheduler of `from_config` keeps one and moves it in `advance`.
All of the state is in `state_dict`; decisions are functions of (plan, state, clock), so equal on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, SupportsFloat

from aiprod_ds.clock import Clock
from aiprod_ds.config.curriculum import CurriculumConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.own_loop import PhaseInfo, own_loop_plan
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.curriculum.plateau import PlateauState
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, ConfigError

_FORMAT = 1


class Action(str, Enum):
    """What the loop does next."""

    STAY = "stay"
    NEXT_PHASE = "next_phase"
    FINISHED = "finished"


class Reason(str, Enum):
    """Why a phase is over, or that it is not."""

    RUNNING = "running"
    UPDATES = "updates"
    EPOCHS = "epochs"
    PLATEAU = "plateau"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the loop does next and why."""

    action: Action
    reason: Reason


class CurriculumScheduler:
    """Decides phase transitions of one run.

    In a loop of your own: make it by `from_config`, do the update that `phase_info()` describes, tell it by
    `advance(loss)`, until the decision that returns is FINISHED.

    With a clock of your own: `decision(clock)` -> STAY: run an update, advance the clock, `observe(clock,
    loss)`; NEXT_PHASE: do the transition and go on with `clock.at_phase(clock.phase + 1)`; FINISHED: stop.
    Observing the same clock again changes nothing.

    Args:
        plan: Of the run, from `plan_run`.

    Raises:
        ConfigError: If `plan` is none.
    """

    def __init__(self, plan: RunPlan) -> None:
        if not isinstance(plan, RunPlan):
            raise ConfigError(
                f"CurriculumScheduler: must be given a plan, got {type(plan).__name__}. Write "
                "CurriculumScheduler.from_config(config), or pass what plan_run returns."
            )
        self._phases = plan.phases
        self._clock: Clock | None = None  # of a plain loop
        self._num_clips: int | None = None
        self._phase = 0
        self._seen = (0, 0)  # applied and skipped updates of the phase that were observed
        self._plateau = PlateauState()

    @classmethod
    def from_config(
        cls,
        config: RunConfig | CurriculumConfig,
        *,
        world_size: int = 1,
        strides: ModelStrides | None = None,
        num_clips: int | None = None,
    ) -> CurriculumScheduler:
        """Returns a scheduler for a loop of your own, which keeps the time itself.

        Args:
            config: A `CurriculumConfig`, or a trainer's whole configuration, which also has the weights of
                the loss and the weight decay.
            world_size: Ranks that share each global batch.
            strides: Of the model, by which lengths are rounded up and sizes checked. None: it takes any.
            num_clips: Clips of one pass over the data; needed where epochs end a phase.

        Raises:
            ConfigError: If `config` is none.
            PlanError: With every problem of the plan.
        """
        made = cls(own_loop_plan(config, world_size=world_size, strides=strides, num_clips=num_clips))
        made._clock, made._num_clips = Clock(), num_clips
        return made

    @property
    def clock(self) -> Clock:
        """Where the loop stands.

        Raises:
            ConfigError: If this scheduler is not of `from_config`: then its caller has the clock.
        """
        if self._clock is None:
            raise ConfigError(
                "CurriculumScheduler: keeps no time of its own, because it was made of a plan. Make it by "
                "from_config, or use decision(clock) and observe(clock, loss)."
            )
        return self._clock

    def phase_info(self) -> PhaseInfo:
        """Returns what the next update of a plain loop is to be.

        Raises:
            ConfigError: If this scheduler is not of `from_config`.
        """
        clock = self.clock
        is_finished = self.decision(clock).action is Action.FINISHED
        return PhaseInfo.of(self._phases[clock.phase], clock, is_finished=is_finished)

    def advance(self, loss: SupportsFloat | None = None, *, is_applied: bool = True) -> Decision:
        """Takes in one update of a plain loop and returns what to do next; after NEXT_PHASE `phase_info` is
        that of the next phase.

        Args:
            loss: Of the update, the same on all ranks. Only phases that a plateau ends look at it.
            is_applied: False if the update was skipped, as for an overflow: the data has moved on, the rates
                have not.

        Raises:
            ConfigError: If all phases are over, a loss is needed and missing, or this scheduler is not of
                `from_config`.
            NonFiniteError: If a whole patience window of losses was NaN or infinite.
        """
        clock, phase = self.clock, self._phases[self.clock.phase]
        needs_loss = is_applied and self.needs_loss(clock)
        if self.decision(clock).action is Action.FINISHED:
            raise ConfigError(
                f"CurriculumScheduler.advance: all phases are over after {clock.updates} updates. Stop when "
                "the decision is FINISHED."
            )
        if needs_loss and loss is None:
            raise ConfigError(
                f"CurriculumScheduler.advance: must be given the loss, by which phase {phase.name!r} ends, "
                "got nothing. Pass it in every update."
            )
        batch = phase.buckets[0]
        epoch = 0 if self._num_clips is None else self._epoch(clock, batch.global_batch_size)
        if is_applied:
            clock = clock.after_update(
                micro_batches=batch.accumulation, samples=batch.global_batch_size, epoch=epoch
            )
        else:
            clock = clock.after_skip(micro_batches=batch.accumulation, epoch=epoch)
        decision = self.observe(clock, _number(loss) if needs_loss and loss is not None else None)
        is_over = decision.action is Action.NEXT_PHASE
        self._clock = clock.at_phase(clock.phase + 1) if is_over else clock
        return decision

    def _epoch(self, clock: Clock, global_batch_size: int) -> int:
        assert self._num_clips is not None, "asked for where it is known"
        return (clock.phase_position + 1) * global_batch_size // self._num_clips

    def needs_loss(self, clock: Clock) -> bool:
        """Returns whether the next applied update must be observed with its loss, reduced over ranks.

        False saves the loop a reduction and a device synchronisation: only plateau phases after warm-up need
        it.
        """
        phase = self._phase_of(clock)
        return phase.end.plateau is not None and clock.phase_updates >= phase.learning_rate.warmup_updates

    def observe(self, clock: Clock, loss: float | None) -> Decision:
        """Takes in the update that led to `clock` and returns what to do next.

        Args:
            clock: After the update, applied or skipped.
            loss: Reduced over ranks; None for a skipped update or where `needs_loss` was False.

        Raises:
            NonFiniteError: If a whole patience window of losses was NaN or infinite.
        """
        self._enter(clock)
        moment = (clock.phase_updates, clock.phase_skipped)
        assert min(now - seen for now, seen in zip(moment, self._seen, strict=True)) >= 0, (
            "load_state_dict comes before a rollback"
        )
        phase, is_new = self._phases[self._phase], clock.phase_updates > self._seen[0]
        if (
            is_new
            and phase.end.plateau is not None
            and clock.phase_updates > phase.learning_rate.warmup_updates
        ):
            assert loss is not None, "needs_loss(clock) was True before this update"
            self._plateau = self._plateau.observe(loss, phase.end.plateau)
        self._seen = moment
        return self.decision(clock)

    def decision(self, clock: Clock) -> Decision:
        """Returns what to do at `clock` without observing anything; also the answer after a resume."""
        phase = self._phase_of(clock)
        reason = self._reason(phase, clock)
        if reason is Reason.RUNNING:
            return Decision(action=Action.STAY, reason=reason)
        is_last = phase.index + 1 == len(self._phases)
        return Decision(action=Action.FINISHED if is_last else Action.NEXT_PHASE, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything a resumed run needs, JSON-ready and bitwise."""
        return {
            "format": _FORMAT,
            "phase": self._phase,
            "phase_name": self._phases[self._phase].name,
            "seen_updates": self._seen[0],
            "seen_skipped": self._seen[1],
            "plateau": self._plateau.to_dict(),
            **({} if self._clock is None else {"clock": self._clock.to_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; nothing changes if it fails.

        Raises:
            CheckpointError: If the state is of another format, damaged or of another curriculum.
        """
        if set(state) != set(self.state_dict()) or state["format"] != _FORMAT:
            raise CheckpointError(
                f"curriculum: must be a scheduler state of format {_FORMAT}, got {dict(state)}. It is "
                "damaged."
            )
        counts = [state[name] for name in ("phase", "seen_updates", "seen_skipped")]
        if any(type(count) is not int or count < 0 for count in counts):
            raise CheckpointError(
                f"curriculum: phase and counts must be non-negative integers, got {counts}. It is damaged."
            )
        phase, updates, skipped = counts
        if phase >= len(self._phases) or self._phases[phase].name != state["phase_name"]:
            raise CheckpointError(
                f"curriculum.phase: must be phase {phase} {state['phase_name']!r} of this configuration, "
                "got phases "
                f"{[known.name for known in self._phases]}. Resume with the configuration of the checkpoint."
            )
        plateau = PlateauState.from_dict(state["plateau"])
        if self._clock is not None:
            self._clock = Clock.from_dict(state["clock"])
        self._phase, self._seen, self._plateau = phase, (updates, skipped), plateau

    def _phase_of(self, clock: Clock) -> PhasePlan:
        assert self._phase <= clock.phase < len(self._phases), (
            f"clock in phase {clock.phase}, scheduler in {self._phase}"
        )
        return self._phases[clock.phase]

    def _enter(self, clock: Clock) -> None:
        if self._phase_of(clock).index != self._phase:
            self._phase, self._seen, self._plateau = clock.phase, (0, 0), PlateauState()

    def _reason(self, phase: PhasePlan, clock: Clock) -> Reason:
        end, updates = phase.end, clock.phase_updates
        if end.limit_updates is not None and updates >= end.limit_updates:
            return Reason.UPDATES
        if updates < end.minimum_updates:
            return Reason.RUNNING
        if end.epochs is not None and clock.epoch >= end.epochs:
            return Reason.EPOCHS
        if end.plateau is not None and phase.index == self._phase and self._plateau.reached(end.plateau):
            return Reason.PLATEAU
        return Reason.RUNNING


def _number(loss: SupportsFloat) -> float:
    # torch warns of a number that is taken of a tensor with a gradient.
    detach = getattr(loss, "detach", None)
    return float(loss if detach is None else detach())
