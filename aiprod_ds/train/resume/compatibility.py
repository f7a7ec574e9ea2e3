"""Whether a checkpoint is of this run, and on what it may go on: other ranks and another ZeRO stage, never other numbers.

Owns the layout that stands in a checkpoint's run state and the comparison at a resume. Reads nothing but that state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.config.fingerprint import config_fingerprint
from aiprod_ds.config.run import RunConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.train.planning.auto import Settled
from aiprod_ds.train.resume.steering import check_steering

_LOG = logging.getLogger(__name__)


def run_layout(config: RunConfig, settled: Settled, *, world_size: int) -> dict[str, Any]:
    """Returns what a run is on, JSON-ready: engine, ranks, ZeRO stage, precision, global batches by phase and bucket, and what
    `engine.parallel: auto` chose.
    """
    kind, settings = config.engine.kind, settled.settings
    return {
        "engine": kind,
        "world_size": world_size,
        "zero_stage": settings.zero_stage if kind == "deepspeed" else 0,
        "precision": settings.precision,
        "global_batch_sizes": [[bucket.global_batch_size for bucket in phase.buckets] for phase in settled.plan.phases],
        "parallel": None if settled.choice is None else settled.choice.to_dict(),
    }


def check_belongs(state: RunState, config: RunConfig, layout: Mapping[str, Any], *, where: str) -> None:
    """Checks that a run may go on from a checkpoint; phases that were changed are logged.

    Args:
        state: Of the checkpoint.
        config: Of this run.
        layout: Of this run, from `run_layout`.
        where: How messages name the checkpoint.

    Raises:
        ConfigError: If configuration, precision, the global batch of the running phase or a phase up to it differ.
    """
    if state.fingerprint != config_fingerprint(config):
        raise ConfigError(
            f"{where}: must be of the same configuration, got a checkpoint of another one. "
            "Restore the configuration (config.yaml in the run folder is what ran), choose another --output-dir or start anew."
        )
    saved, phase = state.layout, state.clock.phase
    if saved.get("precision") != layout["precision"]:
        raise ConfigError(
            f"{where}: must be of this run's precision, {layout['precision']}, got {saved.get('precision')}. "
            "Take engine settings of the same precision."
        )
    for change in check_steering(state.phase_fingerprints, config, state.clock):
        _LOG.warning("curriculum_steered %s", change)
    batches, own = list(saved.get("global_batch_sizes", ()))[phase : phase + 1], layout["global_batch_sizes"][phase]
    if batches != [own]:
        raise ConfigError(
            f"{where}: must have the global batches of this run in curriculum.phases[{phase}], {own} on {layout['world_size']} "
            f"ranks, got {batches} on {saved.get('world_size')}. Name them in global_batch_size, or start as many ranks as the "
            "saved run."
        )


def change_in_words(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns how two layouts differ, e.g. `deepspeed on 2 ranks, ZeRO-1 -> deepspeed on 1 rank, ZeRO-3`; None if they do not."""
    before, after = _in_words(saved), _in_words(now)
    return None if before == after else f"{before} -> {after}"


def _in_words(layout: Mapping[str, Any]) -> str:
    count = layout["world_size"]
    stage = f", ZeRO-{layout['zero_stage']}" if layout["engine"] == "deepspeed" else ""
    return f"{layout['engine']} on {count} rank{'' if count == 1 else 's'}{stage}"
