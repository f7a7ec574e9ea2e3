"""The change from one phase to the next, the one place that does it.

`change_phase` is the order: save, close the loader, rebuild if other parameters are trained, then what the
phase sets once, batch, rate, loader and first micro-batch. It returns what the loop goes on with and changes
nothing of the loop. `enter_phase` is its second half alone, with which a run starts or resumes.

A process that is killed anywhere in between finds the checkpoint that was saved first, repeats the change
from there and arrives at the same numbers. What a phase sets at every update belongs to the loop, its loss
weights and augmentations to the unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.report.environment import device_peak_bytes, reset_device_peak
from aiprod_ds.train.engines import build_engine
from aiprod_ds.train.performance import Performance
from aiprod_ds.train.phase_graphs import PhaseGraphs
from aiprod_ds.train.planning.auto import ResolvedRun
from aiprod_ds.train.resume.data_faults import DataFaults
from aiprod_ds.train.resume.frozen_base import base_of_phase, start_in_words
from aiprod_ds.train.resume.history import History
from aiprod_ds.train.state import TrainState, new_clip, new_ema
from aiprod_ds.train.unit import Stream, Unit

_LOG = logging.getLogger(__name__)
# What rounding may do: the merge adds fp32 products, and in 16 bits the merged weights are rounded where W
# and B A were before.
MAX_DIFFERENCE = {torch.float32: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What no phase changes: a change of phase reads it.

    Attributes:
        resolved: Phases and engine settings that the run really has, the same for unit, engine and loop.
        unit: What is trained; its module is rebuilt where other parameters are trained.
        performance: How it computes.
        peak_flops: Per second, of one device by its data sheet; None for a CPU.
    """

    config: RunConfig
    resolved: ResolvedRun
    unit: Unit
    performance: Performance
    peak_flops: float | None

    def build_engine(self) -> Engine:
        """Returns an engine that trains what the unit was prepared for. Collective."""
        self.performance.prepare(self.unit.module)
        return build_engine(self.config, self.resolved.settings, self.unit, self.resolved.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """A phase that is ready for its next update.

    Attributes:
        clock: At the first moment of the phase, or where a resumed run stands in it.
        stream: The data of the phase; owns the loader's processes.
        batches: What `stream` yields from the clock's position on.
        graphs: Replay the loss; None where it is computed anew for every micro-batch.
    """

    phase: PhasePlan
    clock: Clock
    stream: Stream
    batches: Iterator[MicroBatch]
    graphs: PhaseGraphs | None

    def close(self) -> None:
        """Ends the loader's processes and gives back the memory of graphs. Idempotent."""
        self.stream.close()
        if self.graphs is not None:
            self.graphs.close()


def change_phase(
    parts: RunParts,
    left: Entered | None,
    *,
    state: TrainState,
    clock: Clock,
    history: History,
    faults: DataFaults,
    save: Callable[[], None],
    finish_save: Callable[[], None],
) -> Entered:
    """Returns the phase after the clock's, ready for its first update. Collective.

    Changes, in this order: the checkpoints (one more, at the end of the phase that is left); `stream` and
    `batches` of `left`, which end; if other parameters are trained `engine`, `ema`, `clip` and `base` of
    `state`, the unit's module and `history.retrained`; then `phase`, `phase_updates`, `phase_skipped` and
    `epoch` of the clock; and what `enter_phase` changes.

    Args:
        parts: Read, apart from the unit's module.
        left: What ends; None where a resumed run stood at the phase's end and opened no data.
        state: What was trained so far, and from now on.
        clock: At the end of the phase that is left.
        history: Remembers what was rebuilt.
        faults: Knows the clips that the new phase is not to read; saving may add to them.
        save: Saves the run as it stands, or begins to.
        finish_save: Waits until what was begun is written.

    Raises:
        EngineError: If the module answers otherwise than before it was rebuilt.
        DataError: If the first clips cannot be read.
    """
    before, after = (parts.resolved.plan.phases[index] for index in (clock.phase, clock.phase + 1))
    save()
    if left is not None:
        left.close()  # idempotent: the loop has closed it before it measured the phase
    if not after.trains_as(before):
        finish_save()  # it reads from the engine that is about to be closed
        _rebuild(parts, state, before, after, history)
    return enter_phase(parts, after, state=state, clock=clock.at_phase(after.index), faults=faults)


def enter_phase(
    parts: RunParts, phase: PhasePlan, *, state: TrainState, clock: Clock, faults: DataFaults
) -> Entered:
    """Returns `phase` ready for the update that `clock` stands before. Collective.

    Changes recomputation of the module, and of the engine weight decay, moments (at the phase's first moment
    only: a checkpoint holds them as scaled), batch and learning rate.

    Raises:
        DataError: If the first clips cannot be read.
    """
    _LOG.info("phase_begins name=%s update=%d", phase.name, clock.updates)
    reset_device_peak()
    engine, unit = state.engine, parts.unit
    default = parts.resolved.settings.activation_checkpointing
    begin_phase(engine, unit.module, phase, clock, recompute_default=default)
    stream = unit.open_stream(phase, clock, rank=engine.rank, world_size=engine.world_size)
    try:
        if clock.phase_position or state.streams:
            stream.restore(state.streams.get("ranks", ()))
        bucket = phase.buckets[stream.bucket_at(clock.phase_position)]
        engine.set_batch(micro_batch_size=bucket.micro_batch_size, accumulation=bucket.accumulation)
        engine.set_learning_rate(phase.learning_rate.at(clock.phase_updates))
        if faults.known:
            stream.leave_out(faults.known)
        batches = iter(stream)
        first = next(batches)  # what cannot be read is found before the phase counts as begun
        assert first.position == clock.phase_position, f"loader at {first.position}, clock at {clock}"
    except BaseException:
        stream.close()
        raise
    # Recomputation reads the state of the random numbers, which nothing may do while it is captured.
    is_captured = parts.performance.captures_passes and not phase.recompute(default=default)
    graphs = PhaseGraphs(engine=engine, unit=unit, phase=phase) if is_captured else None
    return Entered(phase=phase, clock=clock, stream=stream, batches=chain([first], batches), graphs=graphs)


def check_recompute(module: nn.Module, plan: RunPlan, *, default: bool, source: str) -> None:
    """Makes sure that every phase finds the blocks it wants recomputed; leaves the module with checkpointing
    off.

    Args:
        module: Before an engine takes it.
        default: Whether phases that do not say recompute; from the engine's settings.
        source: How messages name the configuration.

    Raises:
        ConfigError: If a phase recomputes and the model has no blocks for it.
    """
    wanting = [phase for phase in plan.phases if phase.recompute(default=default)]
    if not wanting:
        return
    try:
        set_recompute(module, enabled=True)
    except EngineError as error:
        raise ConfigError(f"{source}: curriculum.phases[{wanting[0].index}]: {error}") from error
    set_recompute(module, enabled=False)


def begin_phase(
    engine: Engine, module: nn.Module, phase: PhasePlan, clock: Clock, *, recompute_default: bool
) -> None:
    """Puts module and engine in the state that `phase` asks for. Collective.

    Called when a phase begins and again when a run resumes inside it: everything but the moments is set
    again; the moments, which the checkpoint already holds as scaled, are touched at the phase's first moment
    only.
    """
    every = phase.recompute(default=recompute_default)
    set_recompute(module, enabled=every > 0, every=max(every, 1))
    engine.set_weight_decay(phase.weight_decay)
    if clock.phase_position == 0 and phase.moment_scale != 1.0:
        engine.scale_moments(phase.moment_scale)
        _LOG.info(
            "moments_scaled phase=%s policy=%s factor=%g", phase.name, phase.moments, phase.moment_scale
        )


def _rebuild(
    parts: RunParts, state: TrainState, before: PhasePlan, after: PhasePlan, history: History
) -> None:
    """Makes `state` train what `after` trains."""
    state.ema = state.clip = None  # they follow parameters that are about to go, and hold memory
    state.engine, done = retrain(state.engine, parts.unit, before, after, build=parts.build_engine)
    state.ema, state.clip = new_ema(state.engine, parts.config), new_clip(parts.config)
    origin = f"{start_in_words(parts.config)}, trained until phase {after.name}"
    # Starting the run anew does not give these weights, so the next checkpoint stores them.
    state.base = base_of_phase(state.engine, after, parts.config, origin=origin, is_stored=True)
    history.retrained.append(done.to_dict())


@runtime_checkable
class RetrainableUnit(Unit, Protocol):
    """A unit whose phases may train adapters, or parts of the model."""

    def hand_off(self, engine: Engine) -> WeightHandoff:
        """Returns what the weights are with the adapters merged, by the names of the plain module, and the
        masters of what else is trained now. Collective."""

    def take_over(self, handoff: WeightHandoff) -> Iterable[tuple[str, Tensor]]:
        """Yields what was carried by the names that the module has now, after `prepare`. Collective."""

    def probe(self, engine: Engine) -> Tensor:
        """Returns the module's answer to one held-out clip, fp32 on the CPU, the same on all ranks.
        Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """What happened between two phases.

    Attributes:
        phase: Name of the phase that began.
        trained: What was trained before and after, in words.
        relative_difference: ||after - before|| / ||before|| of the module's answer to one held-out clip.
        seconds: Wall time.
        device_peak_bytes: Highest GPU memory of this rank's tensors meanwhile; 0 without a GPU.
    """

    phase: str
    trained: tuple[str, str]
    relative_difference: float
    seconds: float
    device_peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping."""
        return asdict(self)


def retrain(
    engine: Engine, unit: Unit, before: PhasePlan, after: PhasePlan, *, build: Callable[[], Engine]
) -> tuple[Engine, Retraining]:
    """Returns the engine that trains what `after` trains, with the function that `engine` had, and what
    happened. Collective.

    Args:
        engine: Closed by this.
        unit: Whose module it holds.
        build: Makes the new engine of the unit's module.

    Raises:
        EngineError: If the module answers otherwise than before by more than rounding explains.
    """
    assert isinstance(unit, RetrainableUnit), "the configuration refuses other parameters for other trainers"
    began = time.perf_counter()
    reset_device_peak()
    answer = unit.probe(engine)
    handoff = unit.hand_off(engine)
    engine.close()
    unit.prepare(after)
    new = build()
    try:
        new.write_values(unit.take_over(handoff))
        difference = _relative_difference(answer, unit.probe(new))
        _require_same_answer(difference, new, after)
    except BaseException:
        new.close()
        raise
    done = Retraining(
        phase=after.name,
        trained=(_in_words(before), _in_words(after)),
        relative_difference=difference,
        seconds=time.perf_counter() - began,
        device_peak_bytes=device_peak_bytes(),
    )
    _LOG.info(
        "retrained phase=%s trained=%s relative_difference=%.2e seconds=%.2f device_peak_bytes=%d",
        done.phase, " -> ".join(done.trained), difference, done.seconds, done.device_peak_bytes,
    )  # fmt: skip
    return new, done


def _require_same_answer(difference: float, engine: Engine, phase: PhasePlan) -> None:
    allowed = MAX_DIFFERENCE[engine.compute_dtype]
    if not difference <= allowed:
        raise EngineError(
            f"phase {phase.name}: the model must answer as before it was rebuilt, within {allowed:g}, got a "
            f"relative difference of {difference:g}. Resume from the checkpoint of the phase before it, with "
            "training_mode as it was there."
        )


def _relative_difference(before: Tensor, after: Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())


def _in_words(phase: PhasePlan) -> str:
    if phase.adapters is not None:
        return f"adapters of rank {phase.adapters.rank}"
    weights = "what latents do not depend on" if phase.decoder_only else "all weights"
    return f"{weights} but {', '.join(phase.frozen)}" if phase.frozen else weights
