"""Which checkpoints are kept: the last ones, every so many updates, the best by a held-out measure.

A pure choice over names and numbers; what deletes is `store.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aiprod_ds.config.run import CheckpointConfig, KeepBestConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A checkpoint as the choice sees it.

    Attributes:
        value: The measure that `keep_best` names, if it was taken at these very updates.
        is_doubtful: Whether it may have to be given up for a spike.
    """

    name: str
    updates: int
    value: float | None = None
    is_doubtful: bool = False


def surplus(standing: Sequence[Standing], config: CheckpointConfig) -> list[str]:
    """Returns the names that no rule keeps; never the first, nor the first that is not doubtful.

    Worked example: 8, 7, 6, 5, 4 with `keep_last: 2` and `keep_every_updates: 4`: 6 and 5.

    Args:
        standing: Newest first, the one just written at the front.
        config: The rules; each adds to what is kept. Without `keep_last` everything is kept.
    """
    if config.keep_last is None:
        return []
    kept = {entry.name for entry in standing[: config.keep_last]}
    kept |= {entry.name for entry in [entry for entry in standing if not entry.is_doubtful][:1]}
    if config.keep_every_updates is not None:
        kept |= {entry.name for entry in standing if entry.updates % config.keep_every_updates == 0}
    if config.keep_best is not None:
        kept |= _best(standing, config.keep_best)
    return [entry.name for entry in standing if entry.name not in kept]


def _best(standing: Sequence[Standing], rule: KeepBestConfig) -> set[str]:
    sign = 1.0 if rule.mode == "min" else -1.0
    measured = [
        (sign * entry.value, entry.name)
        for entry in standing
        if entry.value is not None and math.isfinite(entry.value)
    ]
    measured.sort(key=lambda pair: pair[0])  # stable: of equal ones the newer
    return {name for _, name in measured[: rule.count]}
