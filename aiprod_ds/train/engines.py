"""From configuration to engine: the settings file, and which of the two engines runs."""

from __future__ import annotations

from pathlib import Path

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import ConfigError
from aiprod_ds.train.unit import Unit


def read_settings(config: RunConfig, *, source: str) -> DeepSpeedSettings:
    """Returns the engine settings that `engine.deepspeed_config` names; a relative path is taken from the working folder, the
    configuration file's folder, or a folder above it.

    Raises:
        ConfigError: If the file is missing or breaks a rule.
    """
    given = config.engine.deepspeed_config
    if not isinstance(given, str):
        return parse_deepspeed_settings(given, where=f"{source}: engine.deepspeed_config")
    folders = [Path(), *Path(source).resolve().parents]
    found = next((folder / given for folder in folders if (folder / given).is_file()), None)
    if found is None:
        raise ConfigError(
            f"{source}: engine.deepspeed_config: must name a file, got {given!r}, which is not there. Check the path."
        )
    return parse_deepspeed_settings(found, where=given)


def build_engine(config: RunConfig, settings: DeepSpeedSettings, unit: Unit, plan: RunPlan) -> Engine:
    """Returns the engine that owns `unit.module` from now on.

    Raises:
        ConfigError: If the local engine is asked for on several ranks.
    """
    bucket = plan.phases[0].buckets[0]
    batch = {"micro_batch_size": bucket.micro_batch_size, "accumulation": bucket.accumulation}
    groups, device = unit.parameter_groups(), dist.initialize()
    if config.engine.kind == "local":
        if dist.world_size() > 1:
            raise ConfigError(
                f"engine.kind: local runs on one process, got {dist.world_size()}. Use deepspeed, or start one process."
            )
        return LocalEngine(unit.module, groups, optimizer=config.optimizer, settings=settings, device=device, **batch)
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

    return DeepSpeedEngine(unit.module, groups, optimizer=config.optimizer, settings=settings, device=device, **batch)
