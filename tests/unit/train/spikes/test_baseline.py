"""How high a value stands: the closed form, and what a series remembers."""

from __future__ import annotations

import math
import random

import pytest

from aiprod_ds.config.optim import SpikesConfig
from aiprod_ds.errors import CheckpointError
from aiprod_ds.train.spikes.baseline import Baseline, Series


def test_the_worked_number() -> None:
    baseline = Baseline.of([1.0] * 10, floor=0.25)
    assert baseline.deviation(2.0) == math.log(2.0) / 0.25
    assert round(baseline.deviation(2.0), 2) == 2.77
    assert baseline.deviation(0.5) == -baseline.deviation(2.0), "values below are below"
    assert baseline.typical == 1.0


def test_it_is_the_median_and_the_wider_of_two_robust_deviations() -> None:
    levels = [0.0, 1.0, 2.0, 3.0, 4.0]
    baseline = Baseline.of([math.exp(level) for level in levels], floor=0.1)
    assert baseline.centre == pytest.approx(2.0, rel=1e-12)
    assert baseline.scale == pytest.approx(1.4826, rel=1e-9), "median deviation 1, against (4 - 2) / 2.326"
    tailed = Baseline.of([1.0] * 98 + [math.exp(4.652)] * 2, floor=0.1)
    assert tailed.scale == pytest.approx(2.0, rel=1e-9), "the 99th percentile counts where half do not move"


def test_the_scale_of_normal_logarithms_is_their_sigma() -> None:
    chance = random.Random(0)
    values = [math.exp(chance.gauss(3.0, 0.5)) for _ in range(100_000)]
    # Of 100,000 the standard error of the median deviation is about 0.4 %.
    assert Baseline.of(values, floor=0.01).scale == pytest.approx(0.5, rel=0.03)


def test_without_logarithms_it_is_of_the_values_themselves() -> None:
    baseline = Baseline.of([-2.0, -1.0, 0.0, 1.0, 2.0], floor=0.1)
    assert baseline.scale == 1.4826
    assert baseline.deviation(14.826) == pytest.approx(10.0, rel=1e-12)
    config = SpikesConfig()
    assert baseline.is_extreme(14.826, config)
    assert not baseline.is_extreme(7.0, config)


def test_of_zeros_alone_nothing_can_be_said() -> None:
    baseline = Baseline.of([0.0] * 20, floor=0.35)
    assert baseline.deviation(1.0) == 0.0
    assert not baseline.is_extreme(1.0, SpikesConfig())


@pytest.mark.parametrize(
    ("highest", "value", "is_extreme"),
    [(1.2, 41.0, True), (1.2, 39.0, False), (30.0, 41.0, False), (30.0, 61.0, True)],
)
def test_an_extreme_value_is_also_many_times_the_median_and_twice_the_highest(
    highest: float, value: float, is_extreme: bool
) -> None:
    baseline = Baseline.of([1.0] * 255 + [highest], floor=0.35)
    assert baseline.is_extreme(value, SpikesConfig()) is is_extreme


def test_values_are_only_collected_at_first() -> None:
    series = Series(floor=0.15, config=SpikesConfig(warmup_updates=20))
    assert [series.observe(value) for value in [1.0] * 19 + [1e6]] == [0.0] * 20
    assert series.baseline is not None
    assert series.observe(1.0) == pytest.approx(0.0, abs=1e-12)


def test_what_stands_high_in_a_row_waits_and_then_joins() -> None:
    series = Series(floor=0.15, config=SpikesConfig(warmup_updates=16, baseline_updates=32))
    for _ in range(32):
        series.observe(1.0)
    deviations = [series.observe(3.0) for _ in range(40)]
    assert deviations == [math.log(3.0) / 0.15] * 40, "judged by what was before the rise"
    assert series.height == 40
    heights = []
    for _ in range(14):
        series.observe(1.0)
        heights.append(series.height)
    assert heights == [37, 34, 31, 28, 25, 22, 19, 16, 13, 10, 7, 4, 1, 0]
    for _ in range(16):
        series.observe(3.0)
    assert series.observe(3.0) < 1.0, "what it was like for 40 updates belongs to the baseline"


def test_a_restored_series_says_the_same_to_the_last_bit() -> None:
    config, chance = SpikesConfig(warmup_updates=50, baseline_updates=64), random.Random(1)
    values = [
        math.exp(chance.gauss(0.0, 0.7)) * (20.0 if chance.random() < 0.02 else 1.0) for _ in range(700)
    ]
    whole = Series(floor=0.15, config=config)
    expected = [whole.observe(value) for value in values]
    for stop in (0, 1, 49, 50, 63, 64, 80, 81, 200, 333, 699):
        first, second = Series(floor=0.15, config=config), Series(floor=0.15, config=config)
        found = [first.observe(value) for value in values[:stop]]
        second.restore(first.to_dict())
        found += [second.observe(value) for value in values[stop:]]
        assert found == expected, f"stopped after {stop}"
    assert len(whole.to_dict()["known"].split()) < 64 + 2 * 16, "it does not grow"


@pytest.mark.parametrize(
    "damaged",
    [
        3,
        {},
        {"known": "0x1p0", "waiting": "", "joined": -1, "height": 0},
        {"known": "nan", "waiting": "", "joined": 1, "height": 0},
        {"known": "0x1p0", "waiting": "", "joined": 40, "height": 0},
        {"known": "0x1p0", "waiting": "", "joined": 1, "height": 1},
        {"known": "one", "waiting": "", "joined": 1, "height": 0},
    ],
)
def test_a_damaged_series_is_refused(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="spikes: must be a saved series of values"):
        Series(floor=0.15, config=SpikesConfig()).restore(damaged)
