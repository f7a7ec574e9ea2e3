"""Whether a checkpoint is of this run, and on what it may go on: other ranks and another ZeRO stage, never
other numbers.

Owns the layout that stands in a checkpoint's run state and the comparison at a resume, phase by phase:
phases that have not begun may be edited. Reads nothing but that state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiprod_ds.checkpoint.consistency import require_layout
from aiprod_ds.checkpoint.state import RunState
from aiprod_ds.clock import Clock
from aiprod_ds.config.fingerprint import config_fingerprint, phase_fingerprints
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.train.planning.auto import ResolvedRun

_LOG = logging.getLogger(__name__)


def run_layout(config: RunConfig, resolved: ResolvedRun, *, world_size: int) -> dict[str, Any]:
    """Returns what a run is on, JSON-ready: engine, ranks, ZeRO stage, precision, global batches by phase and
    bucket, and what `engine.parallel: auto` chose.
    """
    kind, settings = config.engine.kind, resolved.settings
    return {
        "engine": kind,
        "world_size": world_size,
        "zero_stage": settings.zero_stage if kind == "deepspeed" else 0,
        "precision": settings.precision,
        "global_batch_sizes": [
            [bucket.global_batch_size for bucket in phase.buckets] for phase in resolved.plan.phases
        ],
        "parallel": None if resolved.choice is None else resolved.choice.to_dict(),
    }


def check_compatible(state: RunState, config: RunConfig, layout: Mapping[str, Any], *, where: str) -> None:
    """Checks that a run may go on from a checkpoint; phases that were changed are logged.

    Args:
        state: Of the checkpoint.
        layout: Of this run, from `run_layout`.
        where: How messages name the checkpoint.

    Raises:
        ConfigError: If configuration, precision, the global batch of the running phase or a phase up to it
            differ.
    """
    if state.fingerprint != config_fingerprint(config):
        raise ConfigError(
            f"{where}: must be of the same configuration, got a checkpoint of another one. "
            "Restore the configuration (config.yaml in the run folder is what ran), choose another "
            "--output-dir or start anew."
        )
    require_layout(state.layout, where=where)
    saved, phase = state.layout, state.clock.phase
    if saved.get("precision") != layout["precision"]:
        raise ConfigError(
            f"{where}: must be of this run's precision, {layout['precision']}, got {saved.get('precision')}. "
            "Take engine settings of the same precision."
        )
    for change in check_steering(state.phase_fingerprints, config, state.clock):
        _LOG.warning("curriculum_steered %s", change)
    batches, own = (
        list(saved.get("global_batch_sizes", ()))[phase : phase + 1],
        layout["global_batch_sizes"][phase],
    )
    if batches != [own]:
        raise ConfigError(
            f"{where}: must have the global batches of this run in curriculum.phases[{phase}], {own} on "
            f"{layout['world_size']} "
            f"ranks, got {batches} on {saved.get('world_size')}. Name them in global_batch_size, or start "
            "as many ranks as the "
            "saved run."
        )


def require_all(*rules: Callable[[], None]) -> None:
    """Asks every rule.

    Raises:
        ConfigError: With the problems of all of them.
    """
    problems: list[str] = []
    for rule in rules:
        try:
            rule()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def check_clock(clock: Clock, plan: RunPlan, *, where: str) -> None:
    """Checks that a clock is one that this curriculum can reach; that the state agrees with itself is checked
    when it is read.

    Args:
        clock: Of the checkpoint.
        plan: Of this run, whose phases up to the clock's are those of the checkpoint.
        where: How messages name the checkpoint.

    Raises:
        CheckpointError: If its phase cannot be so long.
    """
    phase = plan.phases[clock.phase]
    limit = phase.end.limit_updates
    if limit is not None and clock.phase_updates > limit:
        raise CheckpointError(
            f"{where}: clock.phase_updates: must be at most {limit}, which ends phase {phase.name}, got "
            f"{clock.phase_updates}. It was changed after it was saved: take another checkpoint."
        )


def change_in_words(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns how two layouts differ, e.g. `deepspeed on 2 ranks, ZeRO-1 -> deepspeed on 1 rank, ZeRO-3`;
    None if they do not."""
    before, after = _in_words(saved), _in_words(now)
    return None if before == after else f"{before} -> {after}"


def _in_words(layout: Mapping[str, Any]) -> str:
    count = layout["world_size"]
    stage = f", ZeRO-{layout['zero_stage']}" if layout["engine"] == "deepspeed" else ""
    return f"{layout['engine']} on {count} rank{'' if count == 1 else 's'}{stage}"


def check_steering(
    saved: Sequence[str], config: RunConfig, clock: Clock, *, saved_config: RunConfig | None = None
) -> tuple[str, ...]:
    """Returns what was changed in phases that have not begun, one line each, for the log and the report.

    Args:
        saved: `phase_fingerprints` of the run that is resumed.
        clock: Where the run stands; phases up to and including `clock.phase` are pinned.
        saved_config: The configuration of that run; with it, messages name the keys that changed.

    Raises:
        ConfigError: If a pinned phase was changed, moved or removed; all of them at once.
    """
    now = phase_fingerprints(config)
    pinned: list[str] = []
    steered: list[str] = []
    for index in range(max(len(saved), len(now))):
        before = saved[index] if index < len(saved) else None
        after = now[index] if index < len(now) else None
        if before == after:
            continue
        change = _change(index, config, saved_config, is_added=before is None, is_removed=after is None)
        if index <= clock.phase:
            state = "running" if index == clock.phase else "finished"
            pinned.append(
                f"curriculum.phases[{index}]: must stay as it was, because it is {state} (update "
                f"{clock.updates}), got {change}. "
                "Restore it, edit later phases only, or start a new run in another output_dir."
            )
        else:
            steered.append(f"curriculum.phases[{index}]: {change}")
    if pinned:
        raise ConfigError(pinned)
    return tuple(steered)


def _change(
    index: int, config: RunConfig, saved_config: RunConfig | None, *, is_added: bool, is_removed: bool
) -> str:
    if is_removed:
        return "removed"
    name = config.curriculum.phases[index].name
    if is_added:
        return f"phase {name!r} added"
    if saved_config is None or index >= len(saved_config.curriculum.phases):
        return f"another phase {name!r}"
    old = _flat(saved_config.curriculum.phases[index].model_dump(mode="json"))
    new = _flat(config.curriculum.phases[index].model_dump(mode="json"))
    keys = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    return f"phase {name!r} with " + ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
