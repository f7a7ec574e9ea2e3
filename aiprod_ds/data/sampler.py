"""Which samples make which update: a pure function of (seed, phase, position), the same for every world size.

Every bucket is an infinite stream, one seeded permutation of its samples after the other. Update k of a bucket takes the
samples [k*B, (k+1)*B) of its stream, so nothing is dropped: what does not fill a batch at the end of an epoch opens the next
one. After e epochs a bucket of n samples has given floor(e*n/B) updates. Inside an epoch the buckets' updates are shuffled.

There is no state to save. The caches below only make neighbouring positions cheap. The loader turns samples into clips.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

Integers = npt.NDArray[np.int64]


class SampleRef(NamedTuple):
    """One sample of one update. A tuple, because one is made for every sample of every update.

    Attributes:
        sample_index: In the dataset.
        epoch: Which permutation of its bucket it comes from; with `sample_index` it names the sample's random streams.
        ordinal: Its place in the global batch, 0 <= ordinal < global_batch_size.
    """

    sample_index: int
    epoch: int
    ordinal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSamples:
    """The samples of one bucket: `indices` into the dataset, each once, and how many of them one update takes."""

    indices: tuple[int, ...]
    global_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """The samples of one update over all ranks.

    Attributes:
        position: Updates of the phase that came before, skipped ones included.
        bucket: Which of the phase's buckets it comes from.
        epoch: Pass over the phase's data to which the update belongs; its first samples may be left from earlier ones.
    """

    position: int
    bucket: int
    epoch: int
    samples: tuple[SampleRef, ...]


class PhaseSampler:
    """Random access to the updates of a phase.

    Example: 10 samples in batches of 4 give 2 updates in epoch 0 and 3 in epoch 1, whose first takes the 2 samples left over.

    Args:
        seed: The run's.
        phase: Index of the phase; every phase has its own order.
        buckets: In the order of the phase's plan; one without samples is never drawn.

    Raises:
        DataError: If no bucket has samples, or one lists a sample twice.
    """

    def __init__(self, *, seed: int, phase: int, buckets: Sequence[BucketSamples]) -> None:
        _check(phase, buckets)
        self._seed = seed
        self._phase = phase
        self._sizes = tuple((len(bucket.indices), bucket.global_batch_size) for bucket in buckets)
        self._streams = tuple(
            _Stream(bucket.indices, names=("order", phase, number), seed=seed) for number, bucket in enumerate(buckets)
        )
        self._schedule = self._make_schedule(0)

    def batch(self, position: int) -> GlobalBatch:
        """Returns the update at `position` >= 0."""
        assert position >= 0, f"positions count from 0, got {position}"
        schedule = self._schedule_of(position)
        offset = position - schedule.first
        bucket = schedule.buckets[offset]
        size = self._sizes[bucket][1]
        start = (schedule.firsts[bucket] + schedule.places[offset]) * size
        samples = self._streams[bucket].take(start, size)
        return GlobalBatch(position=position, bucket=bucket, epoch=schedule.epoch, samples=samples)

    def epoch_at(self, position: int) -> int:
        """Returns the number of passes over the data that are complete before the update at `position`.

        A pass is complete when the last update of its epoch is done; samples that did not fill a batch count with it.
        """
        if self._schedule.first < position < self._schedule.first + len(self._schedule.buckets):
            return self._schedule.epoch
        epochs = range(self._epoch_bound(position) + 1)
        epoch = bisect_left(epochs, position, key=self._updates_before)
        return epoch if self._updates_before(epoch) == position else epoch - 1

    def updates_in_epoch(self, epoch: int) -> int:
        """Returns the number of updates of pass `epoch`; 0 when its samples do not fill a batch yet."""
        return self._updates_before(epoch + 1) - self._updates_before(epoch)

    def _updates_before(self, epoch: int) -> int:
        return sum(epoch * count // size for count, size in self._sizes)

    def _epoch_bound(self, updates: int) -> int:
        """Returns an epoch before which there are at least `updates` updates."""
        bound = 1
        while self._updates_before(bound) < updates:
            bound *= 2
        return bound

    def _schedule_of(self, position: int) -> _Schedule:
        schedule = self._schedule
        if not 0 <= position - schedule.first < len(schedule.buckets):
            # Epochs without an update share their successor's first position: the last one that begins there holds it.
            epochs = range(self._epoch_bound(position + 1) + 1)
            schedule = self._schedule = self._make_schedule(bisect_right(epochs, position, key=self._updates_before) - 1)
        return schedule

    def _make_schedule(self, epoch: int) -> _Schedule:
        firsts = [epoch * count // size for count, size in self._sizes]
        updates = [(epoch + 1) * count // size - first for (count, size), first in zip(self._sizes, firsts, strict=True)]
        buckets = np.repeat(np.arange(len(updates)), updates)
        if len(updates) > 1:
            np.random.default_rng(stream_seed(self._seed, "buckets", self._phase, epoch)).shuffle(buckets)
        return _Schedule(epoch=epoch, first=sum(firsts), buckets=buckets.tolist(), places=_places(buckets), firsts=firsts)


def rank_slice(batch: GlobalBatch, *, rank: int, world_size: int, micro_batch_size: int) -> tuple[tuple[SampleRef, ...], ...]:
    """Returns the micro-batches of one rank, in the order in which it accumulates them.

    Micro-step i of all ranks together takes the i-th run of `world_size * micro_batch_size` samples, and rank r the r-th part
    of that run; the ranks' slices are disjoint and their union is the batch, whatever the world size.
    """
    run = world_size * micro_batch_size
    count = len(batch.samples)
    assert count % run == 0, f"global batch {count} must be a multiple of world_size * micro_batch_size = {run}"
    offset = rank * micro_batch_size
    return tuple(batch.samples[start : start + micro_batch_size] for start in range(offset, count, run))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schedule:
    """The order of one epoch: update i is number `firsts[buckets[i]] + places[i]` of bucket `buckets[i]`."""

    epoch: int
    first: int
    buckets: list[int]
    places: list[int]
    firsts: list[int]


class _Stream:
    """The infinite sequence of one bucket's samples; keeps only the permutations that the last request touched."""

    def __init__(self, indices: Sequence[int], *, names: tuple[str | int, ...], seed: int) -> None:
        self._indices = np.asarray(indices, dtype=np.int64)
        self._names = names
        self._seed = seed
        self._permutations: dict[int, Integers] = {}

    def take(self, start: int, size: int) -> tuple[SampleRef, ...]:
        count = len(self._indices)
        stop = start + size
        epochs = range(start // count, (stop - 1) // count + 1)
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs}
        pieces = [self._permutations[e][max(start - e * count, 0) : stop - e * count].tolist() for e in epochs]
        origins = chain.from_iterable([epoch] * len(piece) for epoch, piece in zip(epochs, pieces, strict=True))
        return tuple(map(SampleRef, chain.from_iterable(pieces), origins, range(size)))

    def _permutation(self, epoch: int) -> Integers:
        known = self._permutations.get(epoch)
        if known is not None:
            return known
        return np.random.default_rng(stream_seed(self._seed, *self._names, epoch)).permutation(self._indices)


def _places(buckets: Integers) -> list[int]:
    """Returns, for every entry, how many equal ones stand before it."""
    places = np.empty_like(buckets)
    for bucket in np.unique(buckets):
        chosen = buckets == bucket
        places[chosen] = np.arange(np.count_nonzero(chosen))
    listed: list[int] = places.tolist()
    return listed


def _check(phase: int, buckets: Sequence[BucketSamples]) -> None:
    where = f"phase {phase}"
    if not any(bucket.indices for bucket in buckets):
        raise DataError(
            f"{where}: must have at least one sample in one bucket, got {len(buckets)} empty ones. "
            "Add clips that are long and large enough, or lower the bucket's frames and resolution."
        )
    for number, bucket in enumerate(buckets):
        assert bucket.global_batch_size >= 1, f"global_batch_size must be >= 1, got {bucket.global_batch_size}"
        repeated = len(bucket.indices) - len(set(bucket.indices))
        if repeated:
            raise DataError(
                f"{where}, bucket {number}: must list every sample once, got {repeated} repeated. Remove the repetitions."
            )
