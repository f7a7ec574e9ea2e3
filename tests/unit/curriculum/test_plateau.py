"""The plateau against its definition written as a plain sum, and its answer to rising, noisy and broken
losses."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.config.curriculum import PlateauConfig
from aiprod_ds.curriculum.plateau import PlateauState, earliest_plateau, filling_updates
from aiprod_ds.errors import CheckpointError, NonFiniteError

RULE = PlateauConfig(patience_updates=5, threshold=0.01, smoothing=0.5)


def fires_at(losses: list[float], rule: PlateauConfig) -> int | None:
    """How many losses it takes until the plateau is reached; None if it never is."""
    state = PlateauState()
    for count, loss in enumerate(losses, 1):
        state = state.observe(loss, rule)
        if state.reached(rule):
            return count
    return None


def test_worked_numbers_of_the_docstring() -> None:
    one = PlateauState().observe(4.0, RULE)
    two = one.observe(2.0, RULE)
    assert (one.average, one.weight, two.average, two.weight) == (2.0, 0.5, 2.0, 0.75)
    assert two.best == 2.0 / 0.75
    assert (
        filling_updates(RULE),
        earliest_plateau(RULE),
        filling_updates(PlateauConfig(patience_updates=1)),
    ) == (2, 7, 50)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_constant_loss_fires_at_the_earliest_moment(smoothing: float) -> None:
    rule = PlateauConfig(patience_updates=5, threshold=0.01, smoothing=smoothing)
    assert fires_at([3.0] * 100, rule) == earliest_plateau(rule)


def test_rising_loss_is_no_improvement_and_fires() -> None:
    assert fires_at([1.0 + 0.1 * update for update in range(100)], RULE) == earliest_plateau(RULE)


def test_falling_loss_never_fires() -> None:
    assert fires_at([0.97**update for update in range(1000)], RULE) is None


def test_slow_fall_counts_when_it_adds_up_within_the_patience() -> None:
    # 0.3 % an update is below the threshold of 1 %, but 4 updates together are above it.
    assert fires_at([0.997**update for update in range(500)], RULE) is None
    # 0.1 % an update makes 0.5 % in the patience of 5.
    assert fires_at([0.999**update for update in range(500)], RULE) is not None


def test_negative_loss_that_falls_never_fires() -> None:
    assert fires_at([-1.0 - 0.1 * update for update in range(100)], RULE) is None


def test_zero_threshold_asks_for_any_improvement() -> None:
    rule = PlateauConfig(patience_updates=5, threshold=0.0, smoothing=0.0)
    assert fires_at([1.0 - 1e-9 * update for update in range(200)], rule) is None
    assert fires_at([0.0] * 200, rule) == earliest_plateau(rule)


def test_noise_does_not_fire_on_a_falling_loss_and_does_not_hide_a_flat_one() -> None:
    rule = PlateauConfig(patience_updates=100, threshold=0.01, smoothing=0.98)
    draw = random.Random(0)
    falling = [2.0 * 0.999**update * draw.lognormvariate(0.0, 0.3) for update in range(2000)]
    assert fires_at(falling, rule) is None
    flat = [2.0 * draw.lognormvariate(0.0, 0.3) for _ in range(2000)]
    fired = fires_at(flat, rule)
    assert fired is not None
    assert fired < 1000


def test_first_lucky_value_does_not_become_the_mark() -> None:
    # Without the filling phase the mark would be 0.001 and a healthy run would end after the patience.
    rule = PlateauConfig(patience_updates=20, threshold=0.01, smoothing=0.9)
    assert fires_at([0.001] + [2.0 * 0.99**update for update in range(300)], rule) is None


def test_non_finite_losses_are_left_out_and_counted() -> None:
    clean, broken = PlateauState(), PlateauState()
    for update in range(40):
        loss = 1.0 / (update + 1)
        clean, broken = clean.observe(loss, RULE), broken.observe(loss, RULE)
        for bad in (math.nan, math.inf, -math.inf):
            broken = broken.observe(bad, RULE)
    assert broken.non_finite == 120
    assert (broken.average, broken.weight, broken.best, broken.losses, broken.best_at) == (
        clean.average, clean.weight, clean.best, clean.losses, clean.best_at,
    )  # fmt: skip


def test_whole_window_of_non_finite_losses_is_an_error() -> None:
    state = PlateauState().observe(1.0, RULE)
    for _ in range(4):
        state = state.observe(math.nan, RULE)
    with pytest.raises(
        NonFiniteError,
        match="must be finite at least once in 5 updates, got 5 NaN or infinite losses in a row",
    ):
        state.observe(math.inf, RULE)
    assert state.observe(1.0, RULE).non_finite_run == 0


_losses = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
_rules = st.builds(
    PlateauConfig,
    patience_updates=st.integers(1, 12),
    threshold=st.just(0.0) | st.floats(1e-30, 0.5),
    smoothing=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)


@settings(deadline=None)
@given(losses=_losses, rule=_rules)
def test_smoothed_loss_is_the_weighted_mean_of_its_definition(
    losses: list[float], rule: PlateauConfig
) -> None:
    state, s, n = PlateauState(), rule.smoothing, len(losses)
    for loss in losses:
        state = state.observe(loss, rule)
    weights = [(1 - s) * s ** (n - 1 - index) for index in range(n)]
    mean = math.fsum(w * x for w, x in zip(weights, losses, strict=True)) / math.fsum(weights)
    # Rounding of n additions of numbers up to 1e6.
    assert state.average / state.weight == pytest.approx(mean, rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(losses=_losses, rule=_rules, stop=st.integers(0, 60))
def test_saved_and_restored_anywhere_it_goes_on_bit_for_bit(
    losses: list[float], rule: PlateauConfig, stop: int
) -> None:
    straight, resumed = PlateauState(), PlateauState()
    for index, loss in enumerate(losses):
        if index == stop:
            resumed = PlateauState.from_dict(json.loads(json.dumps(resumed.to_dict())))
        straight, resumed = straight.observe(loss, rule), resumed.observe(loss, rule)
    assert resumed == straight
    assert resumed.to_dict() == straight.to_dict()


@pytest.mark.parametrize(
    "damage",
    [
        {"average": 0.5},
        {"average": "x"},
        {"losses": "1"},
        {"losses": True},
        {"losses": -1},
        {"extra": 1},
        {"weight": None},
        {"average": "nan"},
    ],
)
def test_damaged_state_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="must be a saved plateau state"):
        PlateauState.from_dict({**PlateauState().to_dict(), **damage})
