"""The spikes section: what is refused, and its defaults."""

from __future__ import annotations

from typing import Any

import pytest

from aiprod_ds.config.optim import SpikesConfig
from aiprod_ds.config.phase import PhaseConfig
from aiprod_ds.errors import ConfigError

PHASE = {"name": "a", "resolution": "64x64", "duration": {"frames": 9}, "global_batch_size": 4, "updates": 10}


def test_it_is_on_by_default_and_can_be_turned_off() -> None:
    assert SpikesConfig().mode == "roll_back"
    assert SpikesConfig().skipped_in_a_row == 3
    assert SpikesConfig.model_validate({"mode": "off"}).mode == "off"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "stop"}, "mode"),
        ({"skipped_in_a_row": 0}, "skipped_in_a_row"),
        ({"max_rollbacks": -1}, "max_rollbacks"),
        ({"extreme_factor": 0.5}, "extreme_factor"),
        ({"baseline_updates": 8}, "baseline_updates"),
        ({"warmup_updates": 300}, r"warmup_updates: must be at most baseline_updates \(256\), got 300"),
        (
            {"sustained_deviations": 9.0},
            r"sustained_deviations: must be at most extreme_deviations \(8\), got 9",
        ),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpikesConfig.model_validate(values)


def test_none_of_the_rollbacks_may_be_allowed_and_all_of_a_phase_may_count() -> None:
    assert SpikesConfig.model_validate({"max_rollbacks": 0, "counted_updates": None}).max_rollbacks == 0


@pytest.mark.parametrize("factor", [0.0, -0.5, float("inf"), float("nan")])
def test_a_factor_of_the_learning_rate_is_positive(factor: float) -> None:
    with pytest.raises(ConfigError, match="learning_rate_factor"):
        PhaseConfig.model_validate({**PHASE, "learning_rate": 1e-3, "learning_rate_factor": factor})
