"""From configuration to engine: which of the two runs, and which of its parameters are decayed.

Owns the construction; the settings come from `aiprod_ds.config.deepspeed`. Called by `run.py`; the trainers'
units take `decay_groups`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.flat_parameters import FlatMode
from aiprod_ds.engine.layout import whole_shape
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine, ParameterGroup
from aiprod_ds.errors import ConfigError
from aiprod_ds.train.unit import Unit


def build_engine(config: RunConfig, settings: DeepSpeedSettings, unit: Unit, plan: RunPlan) -> Engine:
    """Returns the engine that owns `unit.module` from now on.

    Raises:
        ConfigError: If the local engine is asked for on several ranks.
    """
    return engine_of(
        unit.module,
        unit.parameter_groups(),
        config,
        optimizer=config.optimizer,
        settings=settings,
        plan=plan,
        flat_parameters=config.engine.flat_parameters,
    )


def engine_of(
    module: nn.Module,
    groups: Sequence[ParameterGroup],
    config: RunConfig,
    *,
    optimizer: OptimizerConfig,
    settings: DeepSpeedSettings,
    plan: RunPlan,
    flat_parameters: FlatMode = "off",
) -> Engine:
    """Returns an engine of the run's kind that owns `module`, with the batch of the plan's first bucket.

    Raises:
        ConfigError: If the local engine is asked for on several ranks.
    """
    bucket = plan.phases[0].buckets[0]
    batch = {"micro_batch_size": bucket.micro_batch_size, "accumulation": bucket.accumulation}
    device = dist.initialize()
    if config.engine.kind == "local":
        if dist.world_size() > 1:
            raise ConfigError(
                f"engine.kind: local runs on one process, got {dist.world_size()}. Use deepspeed, or start "
                "one process."
            )
        return LocalEngine(module, groups, optimizer=optimizer, settings=settings, device=device, **batch)
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    return DeepSpeedEngine(
        module,
        groups,
        optimizer=optimizer,
        settings=settings,
        device=device,
        flat_parameters=flat_parameters,
        **batch,
    )


def decay_groups(module: nn.Module) -> Sequence[ParameterGroup]:
    """Returns the trained parameters in at most two groups, the decayed ones first.

    A tensor with at most one dimension above 1 counts as a vector: biases, gains of norms, and also the [out,
    1, 1] gains of weight normalisation and the [1, channels, 1] slopes of snake activations.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = tuple(name for name, parameter in trained if not _is_vector(parameter))
    plain = tuple(name for name, parameter in trained if _is_vector(parameter))
    groups = (ParameterGroup(names=decayed, is_decayed=True), ParameterGroup(names=plain, is_decayed=False))
    return [group for group in groups if group.names]


def _is_vector(parameter: Tensor) -> bool:
    return sum(size > 1 for size in whole_shape(parameter)) <= 1
