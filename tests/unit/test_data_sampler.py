"""The order of samples: every sample once a pass, at any position, for any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.data.sampler import BucketSamples, GlobalBatch, PhaseSampler, rank_slice
from aiprod_ds.errors import DataError

_SHAPES = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 9)), min_size=1, max_size=3)


def _sampler(shapes: list[tuple[int, int]], seed: int = 0, phase: int = 0) -> PhaseSampler:
    buckets = []
    first = 0
    for count, size in shapes:
        buckets.append(BucketSamples(indices=tuple(range(first, first + count)), global_batch_size=size))
        first += count
    return PhaseSampler(seed=seed, phase=phase, buckets=buckets)


def _drawn(batches: list[GlobalBatch], bucket: int) -> list[tuple[int, int]]:
    samples = chain.from_iterable(batch.samples for batch in batches if batch.bucket == bucket)
    return [(sample.epoch, sample.sample_index) for sample in samples]


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, seed=st.integers(0, 1000))
def test_every_sample_comes_exactly_once_in_each_permutation(shapes: list[tuple[int, int]], seed: int) -> None:
    sampler = _sampler(shapes, seed)
    epochs = 9
    batches = [sampler.batch(position) for position in range(sum(map(sampler.updates_in_epoch, range(epochs))))]

    first = 0
    for bucket, (count, size) in enumerate(shapes):
        drawn = _drawn(batches, bucket)
        complete = len(drawn) // count
        expected = {(epoch, first + index): 1 for epoch in range(complete) for index in range(count)}
        assert Counter(entry for entry in drawn if entry[0] < complete) == expected
        assert len(set(drawn)) == len(drawn)
        assert 0 <= epochs * count - len(drawn) < size
        first += count


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, order=st.permutations(range(25)))
def test_random_access_equals_sequential(shapes: list[tuple[int, int]], order: list[int]) -> None:
    sequential = _sampler(shapes)
    expected = [sequential.batch(position) for position in range(25)]

    jumping = _sampler(shapes)

    assert {position: jumping.batch(position) for position in order} == dict(enumerate(expected))


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES)
def test_epochs_of_positions_equal_a_count_of_updates(shapes: list[tuple[int, int]]) -> None:
    sampler = _sampler(shapes)
    ends = []
    total = 0
    for epoch in range(12):
        assert sampler.updates_in_epoch(epoch) == sum((epoch + 1) * n // b - epoch * n // b for n, b in shapes)
        total += sampler.updates_in_epoch(epoch)
        ends.append(total)

    for position in range(total):
        assert sampler.batch(position).epoch == next(epoch for epoch, end in enumerate(ends) if end > position)
        # The pass that update position-1 completes, or the one before the pass that it belongs to.
        begun = next((epoch for epoch, end in enumerate([0, *ends]) if end >= position), 0)
        complete = begun if [0, *ends][begun] == position else begun - 1
        assert sampler.epoch_at(position) == complete


def test_leftover_samples_open_the_next_epoch() -> None:
    sampler = _sampler([(10, 4)])

    assert [sampler.updates_in_epoch(epoch) for epoch in range(4)] == [2, 3, 2, 3]
    assert [sampler.epoch_at(position) for position in range(6)] == [0, 0, 1, 1, 1, 2]
    assert [sample.epoch for sample in sampler.batch(2).samples] == [0, 0, 1, 1]


def test_a_batch_larger_than_the_data_spans_passes() -> None:
    sampler = _sampler([(3, 8)])

    assert [sample.epoch for sample in sampler.batch(0).samples] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [sampler.epoch_at(position) for position in range(4)] == [0, 3, 6, 8]


@settings(max_examples=60, deadline=None)
@given(micro=st.integers(1, 3), accumulation=st.integers(1, 3), position=st.integers(0, 40))
def test_ranks_together_read_the_same_batch_at_every_world_size(micro: int, accumulation: int, position: int) -> None:
    size = micro * accumulation * 4
    batch = _sampler([(37, size)]).batch(position)
    for world_size in (1, 2, 4):
        ranks = [rank_slice(batch, rank=r, world_size=world_size, micro_batch_size=micro) for r in range(world_size)]

        assert {len(micro_batches) for micro_batches in ranks} == {size // (world_size * micro)}
        assert {len(samples) for samples in chain.from_iterable(ranks)} == {micro}
        together = chain.from_iterable(chain.from_iterable(ranks))
        assert sorted(together, key=lambda sample: sample.ordinal) == list(batch.samples)


def test_seed_phase_and_epoch_change_the_order() -> None:
    def order(seed: int, phase: int, position: int) -> tuple[int, ...]:
        sampler = _sampler([(50, 50)], seed, phase)
        return tuple(sample.sample_index for sample in sampler.batch(position).samples)

    assert len({order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)}) == 4
    assert order(0, 0, 0) == order(0, 0, 0)


def test_buckets_are_mixed_within_an_epoch() -> None:
    sampler = _sampler([(40, 1), (20, 1)])
    buckets = [sampler.batch(position).bucket for position in range(60)]

    assert Counter(buckets) == {0: 40, 1: 20}
    assert buckets != sorted(buckets)


def test_a_bucket_without_samples_is_never_drawn() -> None:
    sampler = _sampler([(0, 2), (5, 2)])

    assert {sampler.batch(position).bucket for position in range(20)} == {1}


def test_a_phase_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="phase 3: must have at least one sample in one bucket, got 1 empty ones"):
        _sampler([(0, 2)], phase=3)


def test_a_repeated_sample_is_refused() -> None:
    with pytest.raises(DataError, match="phase 0, bucket 0: must list every sample once, got 1 repeated"):
        PhaseSampler(seed=0, phase=0, buckets=[BucketSamples(indices=(4, 4), global_batch_size=1)])
