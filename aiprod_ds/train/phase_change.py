"""What happens to module and engine when a phase begins, in one fixed order. The engine is never rebuilt here.

Owns what a phase sets once: activation checkpointing, weight decay and the optimizer's moments. What it sets at every update
(learning rate, batch) and its data belong to the loop, its loss weights and augmentations to the unit.
"""

from __future__ import annotations

import logging

from torch import nn

from aiprod_ds.clock import Clock
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.recompute import apply_activation_checkpointing
from aiprod_ds.errors import ConfigError, EngineError

_LOG = logging.getLogger(__name__)


def check_checkpointing(module: nn.Module, plan: RunPlan, *, default: bool, source: str) -> None:
    """Makes sure that every phase finds the blocks it wants recomputed; leaves the module with checkpointing off.

    Args:
        module: Before an engine takes it.
        plan: The run's phases.
        default: Whether phases that do not say recompute; from the engine's settings.
        source: How messages name the configuration.

    Raises:
        ConfigError: If a phase recomputes and the model has no blocks for it.
    """
    wanting = [phase for phase in plan.phases if _is_checkpointed(phase, default=default)]
    if not wanting:
        return
    try:
        apply_activation_checkpointing(module, enabled=True)
    except EngineError as error:
        raise ConfigError(f"{source}: curriculum.phases[{wanting[0].index}]: {error}") from error
    apply_activation_checkpointing(module, enabled=False)


def begin_phase(engine: Engine, module: nn.Module, phase: PhasePlan, clock: Clock, *, checkpointing_default: bool) -> None:
    """Puts module and engine in the state that `phase` asks for. Collective.

    Called when a phase begins and again when a run resumes inside it: everything but the moments is set again; the moments, which
    the checkpoint already holds as scaled, are touched at the phase's first moment only.
    """
    apply_activation_checkpointing(module, enabled=_is_checkpointed(phase, default=checkpointing_default))
    engine.set_weight_decay(phase.weight_decay)
    if clock.phase_position == 0 and phase.moment_scale != 1.0:
        engine.scale_moments(phase.moment_scale)
        _LOG.info("moments_scaled phase=%s policy=%s factor=%g", phase.name, phase.moments, phase.moment_scale)


def _is_checkpointed(phase: PhasePlan, *, default: bool) -> bool:
    return default if phase.activation_checkpointing is None else phase.activation_checkpointing
