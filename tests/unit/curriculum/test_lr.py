"""Learning-rate schedules against their closed form, at edges and over random phases."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiprod_ds.curriculum.lr import LearningRateSchedule, ScheduleKind


def schedule(
    kind: ScheduleKind, *, warmup: int, updates: int | None, ratio: float = 0.1, peak: float = 1e-4
) -> LearningRateSchedule:
    return LearningRateSchedule(
        peak=peak, kind=kind, warmup_updates=warmup, updates=updates, final_ratio=ratio
    )


@pytest.mark.parametrize(("update", "rate"), [(499, 5e-5), (25500, 5.5e-5), (50000, 1e-5), (0, 1e-7)])
def test_worked_numbers_of_the_docstring(update: int, rate: float) -> None:
    # Oracle: the closed form by hand; relative tolerance for a handful of double roundings.
    assert schedule("cosine", warmup=1000, updates=50001).at(update) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            "cosine",
            [
                0.5,
                1.0,
                1.0,
                0.2 + 0.4 * (1 + math.sqrt(0.5)),
                0.6,
                0.2 + 0.4 * (1 - math.sqrt(0.5)),
                0.2,
                0.2,
            ],
        ),
    ],
)
def test_whole_phase_and_the_clamp_after_it(kind: ScheduleKind, rates: list[float]) -> None:
    rule = schedule(kind, warmup=2, updates=7, ratio=0.2, peak=1.0)
    assert [rule.at(update) for update in range(8)] == pytest.approx(rates, rel=1e-12)


def test_open_phase_is_constant_after_the_warm_up() -> None:
    rule = schedule("constant", warmup=4, updates=None)
    assert [rule.at(update) for update in (0, 3, 4, 10**9)] == pytest.approx(
        [2.5e-5, 1e-4, 1e-4, 1e-4], rel=1e-12
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_ends_at_the_peak_to_the_bit(kind: ScheduleKind) -> None:
    """`peak * 21 / 21` is one bit above this peak: the rate must not be."""
    peak = 0.0019262607527418978
    assert peak * 21 / 21 > peak
    rule = schedule(kind, warmup=21, updates=40, peak=peak)
    assert (rule.at(20), rule.at(21)) == (peak, peak)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_phase_of_one_update_uses_the_peak(kind: ScheduleKind) -> None:
    assert schedule(kind, warmup=0, updates=1).at(0) == 1e-4


@given(
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    rest=st.integers(2, 200),
    ratio=st.floats(0, 1),
    peak=st.floats(1e-6, 10),
)
def test_rate_is_continuous_bounded_and_falls_after_warm_up(
    kind: ScheduleKind, warmup: int, rest: int, ratio: float, peak: float
) -> None:
    rule = schedule(kind, warmup=warmup, updates=warmup + rest, ratio=ratio, peak=peak)
    rates = [rule.at(update) for update in range(warmup + rest + 2)]
    # The steepest slope is 1/w in the warm-up and pi/2 * (1 - r) / (n - 1 - w) in the cosine; 1e-9 for
    # rounding.
    largest_step = (
        peak * max(1 / warmup if warmup else 0.0, (1 - ratio) * math.pi / 2 / (rest - 1)) * (1 + 1e-9) + 1e-15
    )
    assert all(abs(after - before) <= largest_step for before, after in pairwise(rates))
    assert all(0 <= rate <= peak for rate in rates)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(peak if kind == "constant" else peak * ratio, rel=1e-9, abs=1e-15)


@given(factor=st.floats(1e-6, 1e6), update=st.integers(0, 200))
def test_a_factor_multiplies_every_rate(factor: float, update: int) -> None:
    plain = schedule("cosine", warmup=10, updates=100)
    scaled = replace(plain, factor=factor)
    assert scaled.at(update) == factor * plain.at(update)
    assert scaled.highest == factor * plain.peak
    assert plain.at(update) == replace(plain, factor=1.0).at(update)
