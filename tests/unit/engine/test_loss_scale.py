"""Dynamic loss scaling against the rules of DeepSpeed's scaler, event by event."""

from __future__ import annotations

import pytest

from aiprod_ds.config.deepspeed import LossScaleSettings
from aiprod_ds.engine.loss_scale import LossScaler
from aiprod_ds.snapshot import LossScale


def _scales(settings: LossScaleSettings, overflows: str) -> list[float]:
    scaler = LossScaler(settings)
    scales = []
    for event in overflows:
        scaler.update(overflow=event == "x")
        scales.append(scaler.scale)
    return scales


@pytest.mark.parametrize(
    ("settings", "events", "scales"),
    [
        # The worked example of the docstring.
        ({"hysteresis": 1, "loss_scale_window": 2}, "x...", [8, 8, 8, 16]),
        # Hysteresis 2: the first overflow is tolerated, the second halves; only growth restores the
        # tolerance.
        ({"hysteresis": 2, "loss_scale_window": 2}, "x.x", [16, 16, 8]),
        ({"hysteresis": 2, "loss_scale_window": 2}, "x...x", [16, 16, 16, 32, 32]),
        (
            {"hysteresis": 2, "loss_scale_window": 9, "consecutive_hysteresis": True},
            "x.x.xx",
            [16, 16, 16, 16, 16, 8],
        ),
        ({"hysteresis": 1, "min_loss_scale": 4}, "xxxx", [8, 4, 4, 4]),
        ({"loss_scale": 128.0}, "x.x", [128, 128, 128]),
    ],
)
def test_the_scale_follows_the_events(settings: dict[str, float], events: str, scales: list[float]) -> None:
    assert _scales(LossScaleSettings(initial_scale_power=4, **settings), events) == scales


def test_without_settings_the_scale_is_one() -> None:
    scaler = LossScaler(None)
    scaler.update(overflow=True)
    assert scaler.scale == 1.0


@pytest.mark.parametrize("cut", range(7))
def test_a_restored_scaler_goes_on_as_the_saved_one(cut: int) -> None:
    settings = LossScaleSettings(initial_scale_power=4, hysteresis=2, loss_scale_window=2)
    events = "x..x.x..."
    saved = LossScaler(settings)
    for event in events[:cut]:
        saved.update(overflow=event == "x")
    restored = LossScaler(settings)
    restored.restore(saved.state())
    for event in events[cut:]:
        saved.update(overflow=event == "x")
        restored.update(overflow=event == "x")
        assert restored.state() == saved.state()


def test_a_scale_that_does_not_move_has_no_state_and_takes_none() -> None:
    state = LossScale(scale=2.0, updates=1, last_overflow=-1, tolerance=1)
    for settings in (None, LossScaleSettings(loss_scale=8.0)):
        scaler = LossScaler(settings)
        before = scaler.scale
        scaler.restore(state)
        assert (scaler.state(), scaler.scale) == (None, before)


def test_a_lower_hysteresis_holds_for_a_restored_scaler_too() -> None:
    scaler = LossScaler(LossScaleSettings(initial_scale_power=4, hysteresis=1))
    scaler.restore(LossScale(scale=4.0, updates=1, last_overflow=-1, tolerance=2))
    scaler.update(overflow=True)
    assert scaler.scale == 2.0
