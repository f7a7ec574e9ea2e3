"""The engine section: what `flat_parameters` may be with which engine."""

from __future__ import annotations

import pytest

from aiprod_ds.config.run import EngineConfig
from aiprod_ds.errors import ConfigError


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_the_local_engine_takes_any_flat_parameters_without_effect_on_it(mode: str) -> None:
    assert EngineConfig.model_validate({"kind": "local", "flat_parameters": mode}).flat_parameters == mode


def test_flat_parameters_are_auto_by_default_and_can_be_asked_for() -> None:
    assert EngineConfig().flat_parameters == "auto"
    assert EngineConfig.model_validate({"flat_parameters": "on"}).flat_parameters == "on"


def test_flat_parameters_cannot_be_asked_of_the_local_engine() -> None:
    with pytest.raises(ConfigError, match="flat_parameters: on has no effect with kind: local"):
        EngineConfig.model_validate({"kind": "local", "flat_parameters": "on"})
