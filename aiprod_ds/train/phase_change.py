"""What happens to module and engine when a phase begins, in one fixed order. The engine is never rebuilt
here.

Owns what a phase sets once: activation checkpointing, weight decay and the optimizer's moments. What it sets
at every update (learning rate, batch) and its data belong to the loop, its loss weights and augmentations to
the unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from aiprod_ds.clock import Clock
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.report.environment import device_peak_bytes, reset_device_peak
from aiprod_ds.train.unit import Unit

_LOG = logging.getLogger(__name__)
# What rounding may do: the merge adds fp32 products, and in 16 bits the merged weights are rounded where W
# and B A were before.
MAX_DIFFERENCE = {torch.float32: 1e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def check_recompute(module: nn.Module, plan: RunPlan, *, default: bool, source: str) -> None:
    """Makes sure that every phase finds the blocks it wants recomputed; leaves the module with checkpointing
    off.

    Args:
        module: Before an engine takes it.
        plan: The run's phases.
        default: Whether phases that do not say recompute; from the engine's settings.
        source: How messages name the configuration.

    Raises:
        ConfigError: If a phase recomputes and the model has no blocks for it.
    """
    wanting = [phase for phase in plan.phases if _is_recomputed(phase, default=default)]
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
    set_recompute(module, enabled=_is_recomputed(phase, default=recompute_default))
    engine.set_weight_decay(phase.weight_decay)
    if clock.phase_position == 0 and phase.moment_scale != 1.0:
        engine.scale_moments(phase.moment_scale)
        _LOG.info(
            "moments_scaled phase=%s policy=%s factor=%g", phase.name, phase.moments, phase.moment_scale
        )


def _is_recomputed(phase: PhasePlan, *, default: bool) -> bool:
    return default if phase.activation_checkpointing is None else phase.activation_checkpointing


@runtime_checkable
class RetrainableUnit(Unit, Protocol):
    """A unit whose phases may train adapters."""

    def carried(self, engine: Engine) -> WeightHandoff:
        """Returns what the weights are with the adapters merged, by the names of the plain module.
        Collective."""

    def written(self, carried: WeightHandoff) -> Iterable[tuple[str, Tensor]]:
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
        before: The phase that has ended.
        after: The phase that begins.
        build: Makes the new engine of the unit's module.

    Raises:
        EngineError: If the module answers otherwise than before by more than rounding explains.
    """
    assert isinstance(unit, RetrainableUnit), "the configuration refuses adapters for other trainers"
    began = time.perf_counter()
    reset_device_peak()
    answer = unit.probe(engine)
    carried = unit.carried(engine)
    engine.close()
    unit.prepare(after)
    new = build()
    new.write_values(unit.written(carried))
    difference = _relative_difference(answer, unit.probe(new))
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
    allowed = MAX_DIFFERENCE[new.compute_dtype]
    if not difference <= allowed:
        new.close()
        raise EngineError(
            f"phase {after.name}: the model must answer as before it was rebuilt, within {allowed:g}, got a "
            "relative difference "
            f"of {difference:g}. Resume from the checkpoint of the phase before it, with training_mode as "
            "it was there."
        )
    return new, done


def _relative_difference(before: Tensor, after: Tensor) -> float:
    return float((after.double() - before.double()).norm() / before.double().norm())


def _in_words(phase: PhasePlan) -> str:
    return "all weights" if phase.adapters is None else f"adapters of rank {phase.adapters.rank}"
