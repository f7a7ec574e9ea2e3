"""The adaptive clip: statistics against weighted sums written out, the limit, late reading, its state."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from aiprod_ds.config.optim import AdaptiveClipConfig
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.optim.adaptive_clip import AdaptiveClip, NormStatistics

HALF = AdaptiveClipConfig(smoothing=0.5, deviations=3.0, warmup_updates=2)


def _statistics(norms: list[float], config: AdaptiveClipConfig) -> NormStatistics:
    statistics = NormStatistics()
    for norm in norms:
        statistics = statistics.observe(norm, config)
    return statistics


def _clip(norms: list[float], config: AdaptiveClipConfig = HALF, fixed: float | None = None) -> AdaptiveClip:
    clip = AdaptiveClip(config, fixed=fixed)
    for norm in norms:
        clip.observe(norm)
    return clip


def test_the_worked_numbers() -> None:
    statistics = _statistics([1.0, 4.0], HALF)
    assert (statistics.mean, statistics.variance, statistics.weight) == (3.0, pytest.approx(2.0), 1.5)
    assert statistics.limit(HALF, None) == pytest.approx(7.24264, abs=5e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.99, 1.0])
def test_mean_and_variance_are_the_weighted_sums(smoothing: float) -> None:
    """Oracle: numpy over all norms at once; 1e-12: 300 float64 roundings."""
    norms = np.random.default_rng(0).lognormal(size=300)
    weights = float(smoothing) ** np.arange(300)[::-1]
    mean = np.average(norms, weights=weights)
    statistics = _statistics(norms.tolist(), AdaptiveClipConfig(smoothing=smoothing))
    assert statistics.mean == pytest.approx(mean, rel=1e-12)
    assert statistics.variance == pytest.approx(
        np.average((norms - mean) ** 2, weights=weights), rel=1e-11, abs=1e-15
    )


def test_the_limit_is_the_fixed_one_until_the_warm_up_is_over() -> None:
    config = AdaptiveClipConfig(warmup_updates=3)
    limits = [_clip([0.1] * count, config, fixed=1.0).limit() for count in range(5)]
    assert limits == [1.0, 1.0, 1.0, pytest.approx(0.1), pytest.approx(0.1)]
    assert _clip([0.1] * 2, config).limit() is None


def test_the_limit_never_exceeds_the_fixed_one() -> None:
    assert _clip([5.0, 6.0], fixed=1.0).limit() == 1.0
    assert _clip([5.0, 6.0], fixed=None).limit() > 6.0  # type: ignore[operator]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(norm: float) -> None:
    assert _clip([1.0, 4.0, norm]).to_dict() == _clip([1.0, 4.0]).to_dict()
    assert _clip([norm, 1.0, norm, 4.0]).to_dict() == _clip([1.0, 4.0]).to_dict()


def test_zero_gradients_alone_set_no_limit() -> None:
    assert _clip([0.0] * 5, fixed=1.0).limit() == 1.0


def test_a_spike_is_clipped_and_then_forgotten() -> None:
    usual = [1.0 + 0.1 * (-1) ** n for n in range(200)]
    config = AdaptiveClipConfig(smoothing=0.9, warmup_updates=10)
    before = _clip(usual, config).limit()
    assert before is not None
    assert before == pytest.approx(1.0 + 3 * 0.1, abs=0.02)
    after = [_clip([*usual, 100.0, *usual[:count]], config).limit() or 0.0 for count in (0, 50, 200)]
    assert after[0] > 50 > after[1] > before, "the price that the docstring names"
    assert after[2] == pytest.approx(before, rel=0.01)


def test_a_tensor_is_read_as_its_number() -> None:
    clip = AdaptiveClip(HALF, fixed=None)
    for norm in (1.0, 4.0):
        clip.observe(torch.tensor(norm))
    assert clip.to_dict() == _clip([1.0, 4.0]).to_dict()


@pytest.mark.parametrize("cut", range(6))
def test_resume_is_exact_wherever_the_run_stops(cut: int) -> None:
    norms = [1.0, 0.3, math.nan, 7.0, 1.1, 0.7]
    resumed = AdaptiveClip(HALF, fixed=None)
    resumed.restore(json.loads(json.dumps(_clip(norms[:cut]).to_dict())))
    for norm in norms[cut:]:
        resumed.observe(norm)
    assert resumed.to_dict() == _clip(norms).to_dict()
    assert resumed.limit() == _clip(norms).limit()


@pytest.mark.parametrize(
    "change",
    [
        {"mean": None},
        {"mean": "inf"},
        {"variance": "-0x1p+0"},
        {"weight": 1.0},
        {"norms": -1},
        {"norms": 1.0},
        {"other": 1},
    ],
)
def test_damaged_statistics_are_refused(change: dict[str, object]) -> None:
    values = _clip([1.0, 4.0]).to_dict() | change
    with pytest.raises(CheckpointError, match="must be saved statistics"):
        AdaptiveClip(HALF, fixed=None).restore(
            {key: value for key, value in values.items() if value is not None}
        )


def test_anything_but_a_mapping_is_refused() -> None:
    with pytest.raises(CheckpointError, match="must be saved statistics, got None"):
        AdaptiveClip(HALF, fixed=None).restore(None)


@pytest.mark.parametrize(
    "values", [{"smoothing": 1.1}, {"deviations": 0.0}, {"warmup_updates": 0}, {"sigma": 3.0}]
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        AdaptiveClipConfig.model_validate(values)
