"""What a configuration is, as text and as hashes: the resolved YAML, and what a resumed run must not change.

The phases are hashed one by one and apart from the rest, so that phases not yet reached may be edited between
two runs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

from aiprod_ds.config.run import RunConfig
from aiprod_ds.strict_yaml import write_yaml

# Where results go, how often they are saved, measured or shown, how fast data comes, and how the state is
# spread over ranks: none of it changes the weights by more than rounding.
_WITHOUT_EFFECT: dict[str, bool | set[str]] = {
    "output_dir": True,
    "report": True,
    "checkpoint": True,
    "evaluation": True,
    "preview": True,
    "engine": True,
    "performance": True,
    "data": {"num_workers"},
    "curriculum": {"phases"},
}


def config_fingerprint(config: RunConfig) -> str:
    """Returns the sha256 of every setting outside the phases that determines the training result.

    Left out: `output_dir`, `report`, `checkpoint`, `evaluation`, `preview`, `engine`, `performance`,
    `data.num_workers` and `curriculum.phases`. That the precision stays is checked with what the checkpoint
    says of itself.
    """
    return _sha256(config.model_dump(mode="json", exclude=cast("Any", _WITHOUT_EFFECT)))


def phase_fingerprints(config: RunConfig) -> tuple[str, ...]:
    """Returns the sha256 of every phase's own settings, in order."""
    return tuple(_sha256(phase.model_dump(mode="json")) for phase in config.curriculum.phases)


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration, defaults included, as YAML that loads back equal."""
    return write_yaml(config.model_dump(mode="json"))


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
