"""Which runs of skipped updates end a training, and when a fallen loss scale is told of."""

from __future__ import annotations

import logging

import pytest

from aiprod_ds.errors import NonFiniteError
from aiprod_ds.train.overflow import COLLAPSED_UPDATES, MAX_SKIPPED_IN_A_ROW, OverflowWatch


def _observe(watch: OverflowWatch, pattern: str, *, loss_scale: float = 1024.0) -> None:
    for update, letter in enumerate(pattern):
        watch.observe(is_applied=letter == "a", loss_scale=loss_scale, update=update)


def test_a_scale_that_finds_its_level_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _observe(OverflowWatch(lowest_scale=1.0), "s" * 32 + "a" * 400 + "s" + "a" * 999)
    assert sum("update_skipped" in record.message for record in caplog.records) == 33


def test_too_many_in_a_row_end_the_run() -> None:
    watch = OverflowWatch(lowest_scale=1.0)
    _observe(watch, "s" * (MAX_SKIPPED_IN_A_ROW - 1) + "a" + "s" * (MAX_SKIPPED_IN_A_ROW - 1))
    with pytest.raises(
        NonFiniteError, match="update 7: gradients must be finite, got 50 updates that were not"
    ):
        watch.observe(is_applied=False, loss_scale=1.0, update=7)


def test_a_storm_ends_the_run_though_updates_are_applied_between() -> None:
    with pytest.raises(NonFiniteError, match=r"got 100 of the last \d\d\d updates that were not"):
        _observe(OverflowWatch(lowest_scale=1.0), "saas" * 200)


def test_a_storm_is_forgotten_after_200_updates() -> None:
    _observe(OverflowWatch(lowest_scale=1.0), ("s" * 49 + "a" * 151) * 20)


@pytest.mark.parametrize(
    ("lowest", "scale", "told"), [(1.0, 1.0, True), (1.0, 2.0, False), (None, 1.0, False)]
)
def test_a_collapsed_scale_is_told_once(
    lowest: float | None, scale: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _observe(OverflowWatch(lowest_scale=lowest), "a" * 3 * COLLAPSED_UPDATES, loss_scale=scale)
    assert sum("loss_scale_collapsed" in record.message for record in caplog.records) == int(told)
