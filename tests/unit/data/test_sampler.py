"""The order of samples: every sample once a permutation, at any position, for any number of ranks."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiprod_ds.data.sampler import BucketSamples, GlobalBatch, PhaseSampler, rank_slice
from aiprod_ds.errors import DataError

_SHAPES = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 9)), min_size=1, max_size=3)
_PARTS = st.lists(st.integers(1, 20), min_size=3, max_size=3)


def _sampler(
    shapes: list[tuple[int, int]],
    seed: int = 0,
    phase: int = 0,
    parts: list[int] | None = None,
    *,
    is_shared: bool = False,
) -> PhaseSampler:
    """A sampler of buckets (samples, batch), with samples of their own, or from 0 on in each if shared;
    `parts` are shares."""
    buckets = []
    first = 0
    known = parts and parts[: len(shapes)]
    for number, (count, size) in enumerate(shapes):
        share = known[number] / sum(known) if known else None
        indices = tuple(range(count)) if is_shared else tuple(range(first, first + count))
        buckets.append(BucketSamples(indices=indices, global_batch_size=size, share=share))
        first += count
    return PhaseSampler(seed=seed, phase=phase, buckets=buckets)


def _drawn(batches: list[GlobalBatch], bucket: int) -> list[tuple[int, int]]:
    samples = chain.from_iterable(batch.samples for batch in batches if batch.bucket == bucket)
    return [(sample.epoch, sample.sample_index) for sample in samples]


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, seed=st.integers(0, 1000), parts=st.none() | _PARTS)
def test_no_sample_comes_twice_in_a_permutation_of_its_bucket(
    shapes: list[tuple[int, int]], seed: int, parts: list[int] | None
) -> None:
    sampler = _sampler(shapes, seed, parts=parts)
    batches = [sampler.batch(position) for position in range(60)]

    first = 0
    for bucket, (count, _) in enumerate(shapes):
        drawn = _drawn(batches, bucket)
        complete = len(drawn) // count
        expected = {(epoch, first + index): 1 for epoch in range(complete) for index in range(count)}
        assert Counter(entry for entry in drawn if entry[0] < complete) == expected
        assert len(set(drawn)) == len(drawn)
        first += count


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, epochs=st.integers(1, 9))
def test_every_sample_comes_in_each_of_the_first_passes(shapes: list[tuple[int, int]], epochs: int) -> None:
    sampler = _sampler(shapes)
    batches = [sampler.batch(position) for position in range(sampler.updates_in(epochs))]

    first = 0
    for bucket, (count, size) in enumerate(shapes):
        drawn = _drawn(batches, bucket)
        assert {(epoch, first + index) for epoch in range(epochs) for index in range(count)} <= set(drawn)
        assert 0 <= len(drawn) - epochs * count < size
        first += count


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, parts=st.none() | _PARTS, order=st.permutations(range(40)))
def test_random_access_equals_sequential(
    shapes: list[tuple[int, int]], parts: list[int] | None, order: list[int]
) -> None:
    sequential = _sampler(shapes, parts=parts, is_shared=True)
    expected = [sequential.batch(position) for position in range(40)]

    jumping = _sampler(shapes, parts=parts, is_shared=True)
    answers = {
        position: (jumping.epoch_at(position), jumping.bucket_at(position), jumping.batch(position))
        for position in order
    }

    assert answers == {batch.position: (batch.epoch, batch.bucket, batch) for batch in expected}


@settings(max_examples=60, deadline=None)
@given(shapes=_SHAPES, parts=st.none() | _PARTS)
def test_passes_of_positions_agree_with_their_lengths(
    shapes: list[tuple[int, int]], parts: list[int] | None
) -> None:
    sampler = _sampler(shapes, parts=parts)
    ends = [sampler.updates_in(epochs) for epochs in range(100)]

    assert ends[0] == 0
    assert ends[1] >= 1
    assert ends == sorted(ends)
    for position in range(min(60, ends[-1])):
        complete = sum(end <= position for end in ends) - 1
        assert sampler.epoch_at(position) == complete == sampler.batch(position).epoch


def test_samples_that_fill_no_batch_are_not_left_out() -> None:
    sampler = _sampler([(10, 4)])

    assert [sampler.updates_in(epochs) for epochs in range(5)] == [0, 3, 5, 8, 10]
    assert [sampler.epoch_at(position) for position in range(6)] == [0, 0, 0, 1, 1, 2]
    assert [sample.epoch for sample in sampler.batch(2).samples] == [0, 0, 1, 1]


def test_a_batch_larger_than_the_data_spans_passes() -> None:
    sampler = _sampler([(3, 8)])

    assert [sample.epoch for sample in sampler.batch(0).samples] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [sampler.epoch_at(position) for position in range(4)] == [0, 2, 5, 8]
    assert [sampler.updates_in(epochs) for epochs in (1, 2, 3, 8)] == [1, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    position=st.integers(0, 40),
    parts=st.none() | _PARTS,
    worlds=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_ranks_together_read_the_same_batch_at_every_world_size(
    micro: int, accumulation: int, position: int, parts: list[int] | None, worlds: list[int]
) -> None:
    size = micro * accumulation * 12
    batch = _sampler([(37, size), (5, size)], parts=parts).batch(position)
    for world_size in (world for world in worlds if 12 % world == 0):
        ranks = [
            rank_slice(batch, rank=r, world_size=world_size, micro_batch_size=micro)
            for r in range(world_size)
        ]

        assert {len(micro_batches) for micro_batches in ranks} == {size // (world_size * micro)}
        assert {len(samples) for samples in chain.from_iterable(ranks)} == {micro}
        together = chain.from_iterable(chain.from_iterable(ranks))
        assert sorted(together, key=lambda sample: sample.ordinal) == list(batch.samples)


def test_samples_are_a_sequence_that_can_be_sent() -> None:
    samples = _sampler([(3, 8)]).batch(0).samples
    refs = list(samples)

    assert [samples[place] for place in range(8)] == refs
    assert list(samples[5:2:-1]) == refs[5:2:-1]
    assert [ref.ordinal for ref in refs] == list(range(8))
    received = pickle.loads(pickle.dumps(samples[2:6]))
    assert received == samples[2:6] != samples[1:5]
    assert len({received, samples[2:6], samples[1:5]}) == 2


def test_seed_phase_and_epoch_change_the_order() -> None:
    def order(seed: int, phase: int, position: int) -> tuple[int, ...]:
        sampler = _sampler([(50, 50)], seed, phase)
        return tuple(sample.sample_index for sample in sampler.batch(position).samples)

    assert len({order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)}) == 4
    assert order(0, 0, 0) == order(0, 0, 0)


def test_a_phase_without_samples_is_refused() -> None:
    with pytest.raises(
        DataError, match="phase 3: must have at least one sample in one bucket, got 1 empty ones"
    ):
        _sampler([(0, 2)], phase=3)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"phase 0, bucket 1: must have at least one sample for its share of 0\.25, got none"
    ):
        _sampler([(4, 2), (0, 2)], parts=[3, 1])


def test_a_repeated_sample_is_refused() -> None:
    with pytest.raises(DataError, match="phase 0, bucket 0: must list every sample once, got 1 repeated"):
        PhaseSampler(seed=0, phase=0, buckets=[BucketSamples(indices=(4, 4), global_batch_size=1)])
