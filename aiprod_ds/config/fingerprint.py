"""What a configuration is, as text and as hashes: the resolved YAML, and what a resumed run must not change.

The phases are hashed one by one and apart from the rest, so that phases not yet reached may be edited between
two runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from aiprod_ds.config.run import RunConfig
from aiprod_ds.strict_yaml import write_yaml

# Where results go, how often they are saved, measured or shown, how fast data comes, and how the state is
# spread over ranks: none of it changes the weights by more than rounding. And what a run does about spikes,
# which is changed when it has stopped for them; what it did so far stands in its checkpoints.
_WITHOUT_EFFECT: dict[str, bool | set[str]] = {
    "output_dir": True,
    "report": True,
    "checkpoint": True,
    "evaluation": True,
    "preview": True,
    "engine": True,
    "performance": True,
    "spikes": True,
    "data": {"num_workers", "duplicates", "storage", "fingerprint"},
    "curriculum": {"phases"},
}
# Keys that came after runs had been hashed without them, and what those runs did: with it they are no part of
# the hash, so that such a run can be resumed.
_CAME_LATER: dict[str, dict[str, Any]] = {
    "data": {
        "alpha_background": [0, 0, 0],
        "hdr": "tone_map",
        "interlaced": "deinterlace",
        "scenes": "none",
        "scene_threshold": 27.0,
    },
    "loss": {
        "adversarial": None,
        "adversarial_weight": 0.0,
        "feature_matching_weight": 0.0,
        "kl_free_bits": 0.0,
        "frame_difference_weight": 0.0,
        "flicker_weight": 0.0,
    },
}
_CAME_LATER_TO_PHASES: dict[str, Any] = {"decoder_only": False, "frozen": [], "latents": None}


def config_fingerprint(config: RunConfig) -> str:
    """Returns the sha256 of every setting outside the phases that determines the training result.

    Left out: `output_dir`, `report`, `checkpoint`, `evaluation`, `preview`, `engine`, `performance`,
    `spikes`, `data.num_workers`, `data.duplicates`, `data.fingerprint` and `curriculum.phases`; and later
    keys with their defaults. That the precision stays is checked with what the checkpoint says of itself.
    """
    values = config.model_dump(mode="json", exclude=cast("Any", _WITHOUT_EFFECT))
    for section, later in _CAME_LATER.items():
        values[section] = _without(values[section], later)
    return _sha256(values)


def phase_fingerprints(config: RunConfig) -> tuple[str, ...]:
    """Returns the sha256 of every phase's own settings, in order; without `learning_rate_factor`, which may
    change while the phase runs."""
    phases = [
        phase.model_dump(mode="json", exclude={"learning_rate_factor"}) for phase in config.curriculum.phases
    ]
    return tuple(_sha256(_without(phase, _CAME_LATER_TO_PHASES)) for phase in phases)


def to_yaml(config: RunConfig) -> str:
    """Returns the resolved configuration, defaults included, as YAML that loads back equal."""
    return write_yaml(config.model_dump(mode="json"))


def _without(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` without those of `later` that are as they are there."""
    return {key: value for key, value in values.items() if key not in later or value != later[key]}


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
