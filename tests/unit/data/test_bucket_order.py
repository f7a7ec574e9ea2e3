"""Which bucket has its turn: mixed inside a pass without shares, never one update off its share with them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.data.bucket_order import BucketOrder, PassOrder, ShareOrder

_PARTS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def _shared(
    shares: list[float], *, seed: int = 0, batches: list[int] | None = None, num_samples: int = 64
) -> ShareOrder:
    sizes = [(num_samples, batch) for batch in batches or [4] * len(shares)]
    return ShareOrder(sizes, shares, num_samples=num_samples, seed=seed, phase=0)


def _buckets(order: BucketOrder, updates: int) -> list[int]:
    return [order.turn(position).bucket for position in range(updates)]


def _assert_counts_up(order: BucketOrder, updates: int) -> None:
    given_turns: Counter[int] = Counter()
    for position in range(updates):
        bucket, number = order.turn(position)
        assert number == given_turns[bucket]
        given_turns[bucket] += 1


@settings(max_examples=60, deadline=None)
@given(parts=_PARTS, seed=st.integers(0, 1000))
def test_no_bucket_is_ever_one_update_off_its_share(parts: list[int], seed: int) -> None:
    # Oracle: exact fractions. Shares are kept to 1e-6, which 400 updates turn into less than 1e-3 of one.
    order = _shared([part / sum(parts) for part in parts], seed=seed)
    counts = Counter[int]()
    for updates, bucket in enumerate(_buckets(order, 400), start=1):
        counts[bucket] += 1
        for number, part in enumerate(parts):
            assert abs(counts[number] - updates * Fraction(part, sum(parts))) < 1 + Fraction(1, 1000)


@settings(max_examples=60, deadline=None)
@given(parts=_PARTS, sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), max_size=3))
def test_every_bucket_counts_its_own_updates(parts: list[int], sizes: list[tuple[int, int]]) -> None:
    _assert_counts_up(_shared([part / sum(parts) for part in parts]), 200)
    _assert_counts_up(PassOrder([*sizes, (1, 1)], seed=0, phase=0), 100)


@pytest.mark.parametrize(
    ("shares", "period"),
    [([0.2, 0.8], 5), ([1.0], 1), ([0.333333, 0.333333, 0.333334], 3), ([0.125, 0.5, 0.375], 8)],
)
def test_shares_are_exact_after_every_period(shares: list[float], period: int) -> None:
    buckets = _buckets(_shared(shares), 20 * period)
    for first in range(0, len(buckets), period):
        block = Counter(buckets[first : first + period])
        assert [block[bucket] for bucket in range(len(shares))] == [round(share * period) for share in shares]


def test_blocks_run_in_both_directions_as_the_seed_says() -> None:
    # Half and half: a fixed alternation would give one bucket all even updates.
    assert set(_buckets(_shared([0.5, 0.5]), 40)[::2]) == {0, 1}
    assert _buckets(_shared([0.5, 0.5], seed=1), 40) != _buckets(_shared([0.5, 0.5]), 40)


def test_a_rare_bucket_has_its_turn() -> None:
    assert Counter(_buckets(_shared([0.001, 0.999]), 2_000)) == {0: 2, 1: 1_998}


def test_shared_passes_count_samples() -> None:
    order = _shared([0.2, 0.8], batches=[16, 4])  # 6.4 samples an update, 64 samples
    assert [order.updates_in(passes) for passes in range(4)] == [0, 10, 20, 30]
    assert [order.passes_before(position) for position in (0, 9, 10, 19, 20)] == [0, 0, 1, 1, 2]


def test_passes_without_shares_take_every_bucket_once() -> None:
    order = PassOrder([(10, 4), (6, 3)], seed=0, phase=0)
    assert [order.updates_in(passes) for passes in range(4)] == [0, 5, 9, 14]
    assert Counter(_buckets(order, 5)) == {0: 3, 1: 2}


def test_buckets_are_mixed_within_a_pass_and_anew_in_the_next() -> None:
    buckets = _buckets(PassOrder([(40, 1), (20, 1)], seed=0, phase=0), 120)
    assert Counter(buckets[:60]) == Counter(buckets[60:]) == {0: 40, 1: 20}
    assert buckets[:60] != sorted(buckets[:60])
    assert buckets[:60] != buckets[60:]


def test_a_bucket_without_samples_is_never_drawn() -> None:
    assert set(_buckets(PassOrder([(0, 2), (5, 2)], seed=0, phase=0), 20)) == {1}
