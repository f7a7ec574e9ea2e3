"""What may change between two runs of one curriculum: only phases that have not begun.

Called on resume with the fingerprints from the checkpoint; the rest of the configuration is compared by
`aiprod_ds.config.fingerprint.config_fingerprint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiprod_ds.clock import Clock
from aiprod_ds.config.fingerprint import phase_fingerprints
from aiprod_ds.config.run import RunConfig
from aiprod_ds.errors import ConfigError


def check_steering(
    saved: Sequence[str], config: RunConfig, clock: Clock, *, saved_config: RunConfig | None = None
) -> tuple[str, ...]:
    """Returns what was changed in phases that have not begun, one line each, for the log and the report.

    Args:
        saved: `phase_fingerprints` of the run that is resumed.
        config: The configuration to go on with.
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
                f"curriculum.phases[{index}]: must stay as it was, because it is {state} (update {clock.updates}), got {change}. "
                "Restore it, edit later phases only, or start a new run in another output_dir."
            )
        else:
            steered.append(f"curriculum.phases[{index}]: {change}")
    if pinned:
        raise ConfigError(pinned)
    return tuple(steered)


def _change(index: int, config: RunConfig, saved_config: RunConfig | None, *, is_added: bool, is_removed: bool) -> str:
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
