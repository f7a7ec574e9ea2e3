"""Which samples make which update: a pure function of (seed, phase, position), the same for every world size.

Every bucket is an infinite stream, one seeded permutation of its samples after the other. Update k of a
bucket takes the samples [k*B, (k+1)*B) of its stream, so nothing is dropped: what does not fill a batch at
the end of a permutation opens a batch that the next one completes. `bucket_order` says which bucket has its
turn and when a pass over the data is complete.

There is no state to save. The caches below only make neighbouring positions cheap. The loader turns samples
into clips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from aiprod_ds.data.bucket_order import BucketOrder, PassOrder, ShareOrder
from aiprod_ds.errors import DataError
from aiprod_ds.rng import stream_seed

Integers = npt.NDArray[np.int64]
_MAX_SUBSTITUTES = 64


class SampleRef(NamedTuple):
    """One sample of one update.

    Attributes:
        sample_index: Index into the dataset.
        epoch: Which permutation of its bucket it comes from; with `sample_index` it names the sample's random
            streams.
        ordinal: Its place in the global batch, 0 <= ordinal < global_batch_size.
    """

    sample_index: int
    epoch: int
    ordinal: int


class Samples(Sequence[SampleRef]):
    """Samples of one update in three columns; each becomes a `SampleRef` when it is looked at.

    The training process only cuts and sends them, which is much cheaper than making every `SampleRef`; the
    workers look.

    Args:
        indices: `SampleRef.sample_index`, a column as long as the other two.
        epochs: `SampleRef.epoch`.
        ordinals: `SampleRef.ordinal`.
    """

    __slots__ = ("_epochs", "_indices", "_ordinals")

    def __init__(self, indices: list[int], epochs: list[int], ordinals: range) -> None:
        self._indices = indices
        self._epochs = epochs
        self._ordinals = ordinals

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> SampleRef: ...

    @overload
    def __getitem__(self, place: slice) -> Samples: ...

    def __getitem__(self, place: int | slice) -> SampleRef | Samples:
        """Returns one sample, or some as `Samples`."""
        if isinstance(place, slice):
            return Samples(self._indices[place], self._epochs[place], self._ordinals[place])
        return SampleRef(self._indices[place], self._epochs[place], self._ordinals[place])

    def __iter__(self) -> Iterator[SampleRef]:
        """Yields the samples in order."""
        return map(SampleRef, self._indices, self._epochs, self._ordinals)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSamples:
    """The samples of one bucket: `indices` into the dataset, each once, and how many of them one update
    takes.

    `share` is the fraction of the phase's updates; None in all buckets of a phase whose samples are in one
    bucket each.
    """

    indices: tuple[int, ...]
    global_batch_size: int
    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """The samples of one update over all ranks.

    Attributes:
        position: Updates of the phase that came before, skipped ones included.
        bucket: Which of the phase's buckets it comes from.
        epoch: Pass over the phase's data to which the update belongs; its last samples may be the first of
            the next one.
    """

    position: int
    bucket: int
    epoch: int
    samples: Samples


class PhaseSampler:
    """Random access to the updates of a phase.

    Example: 10 samples in batches of 4 give 3 updates in pass 0, whose last takes 2 samples of the next
    permutation, and 2 updates in pass 1.

    Args:
        phase: Index of the phase; every phase has its own order, and every seed.
        buckets: In the order of the phase's plan; without shares, one that has no samples is never drawn.

    Raises:
        DataError: If no bucket has samples, one with a share has none, or one lists a sample twice.
    """

    def __init__(self, *, seed: int, phase: int, buckets: Sequence[BucketSamples]) -> None:
        _check(phase, buckets)
        self.phase = phase
        self._seed = seed
        self._indices = tuple(bucket.indices for bucket in buckets)
        self._batch_sizes = tuple(bucket.global_batch_size for bucket in buckets)
        self._streams = tuple(
            _Stream(bucket.indices, names=("order", phase, number), seed=seed)
            for number, bucket in enumerate(buckets)
        )
        self._order = _order(buckets, seed=seed, phase=phase)

    def batch(self, position: int) -> GlobalBatch:
        """Returns the update at `position` >= 0."""
        assert position >= 0, f"positions count from 0, got {position}"
        bucket, number = self._order.turn(position)
        size = self._batch_sizes[bucket]
        samples = self._streams[bucket].take(number * size, size)
        return GlobalBatch(position=position, bucket=bucket, epoch=self.epoch_at(position), samples=samples)

    def bucket_at(self, position: int) -> int:
        """Returns the bucket of the update at `position`, without making its samples."""
        return self._order.turn(position).bucket

    def epoch_at(self, position: int) -> int:
        """Returns the number of passes over the data that are complete before the update at `position`."""
        return self._order.passes_before(position)

    def substitutes(self, position: int, bucket: int, ordinal: int) -> Iterator[int]:
        """Yields clips of `bucket` that may take the place of one that cannot be read: those behind a random
        one.

        Args:
            position: Of the update.
            bucket: Of the update.
            ordinal: Of the sample in its global batch.
        """
        indices = self._indices[bucket]
        names = ("substitute", self.phase, bucket, position, ordinal)
        first = int(np.random.default_rng(stream_seed(self._seed, *names)).integers(len(indices)))
        for place in range(first, first + min(len(indices), _MAX_SUBSTITUTES)):
            yield indices[place % len(indices)]

    def updates_in(self, epochs: int) -> int:
        """Returns the number of updates after which the first `epochs` passes over the data are complete."""
        return self._order.updates_in(epochs)


def rank_slice(
    batch: GlobalBatch, *, rank: int, world_size: int, micro_batch_size: int
) -> tuple[Samples, ...]:
    """Returns the micro-batches of one rank, in the order in which it accumulates them.

    Micro-step i of all ranks together takes the i-th run of `world_size * micro_batch_size` samples, and rank
    r the r-th part of that run; the ranks' slices are disjoint and their union is the batch, whatever the
    world size.
    """
    run = world_size * micro_batch_size
    count = len(batch.samples)
    assert count % run == 0, (
        f"global batch {count} must be a multiple of world_size * micro_batch_size = {run}"
    )
    offset = rank * micro_batch_size
    return tuple(batch.samples[start : start + micro_batch_size] for start in range(offset, count, run))


def _order(buckets: Sequence[BucketSamples], *, seed: int, phase: int) -> BucketOrder:
    sizes = [(len(bucket.indices), bucket.global_batch_size) for bucket in buckets]
    shares = [bucket.share for bucket in buckets if bucket.share is not None]
    if not shares:
        return PassOrder(sizes, seed=seed, phase=phase)
    num_samples = len(set(chain.from_iterable(bucket.indices for bucket in buckets)))
    return ShareOrder(sizes, shares, num_samples=num_samples, seed=seed, phase=phase)


class _Stream:
    """The infinite sequence of one bucket's samples; keeps only the permutations that the last request
    touched."""

    def __init__(self, indices: Sequence[int], *, names: tuple[str | int, ...], seed: int) -> None:
        self._indices = np.asarray(indices, dtype=np.int64)
        self._names = names
        self._seed = seed
        self._permutations: dict[int, Integers] = {}

    def take(self, start: int, size: int) -> Samples:
        count = len(self._indices)
        stop = start + size
        epochs = range(start // count, (stop - 1) // count + 1)
        # A batch may reach into the next permutation, and the one after it begins there: both are kept.
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs}
        indices: list[int] = []
        origins: list[int] = []
        for epoch, permutation in self._permutations.items():
            piece = permutation[max(start - epoch * count, 0) : stop - epoch * count].tolist()
            indices += piece
            origins += [epoch] * len(piece)
        return Samples(indices, origins, range(size))

    def _permutation(self, epoch: int) -> Integers:
        known = self._permutations.get(epoch)
        if known is not None:
            return known
        # A generator for each permutation: any of them can be made without those before it.
        return np.random.default_rng(stream_seed(self._seed, *self._names, epoch)).permutation(self._indices)


def _check(phase: int, buckets: Sequence[BucketSamples]) -> None:
    where = f"phase {phase}"
    if not any(bucket.indices for bucket in buckets):
        raise DataError(
            f"{where}: must have at least one sample in one bucket, got {len(buckets)} empty ones. "
            "Add clips that are long and large enough, or lower the bucket's frames and resolution."
        )
    for number, bucket in enumerate(buckets):
        assert bucket.global_batch_size >= 1, (
            f"global_batch_size must be >= 1, got {bucket.global_batch_size}"
        )
        if bucket.share is not None and not bucket.indices:
            raise DataError(
                f"{where}, bucket {number}: must have at least one sample for its share of "
                f"{bucket.share:g}, got none. "
                "Add clips that are long enough, or remove the bucket."
            )
        repeated = len(bucket.indices) - len(set(bucket.indices))
        if repeated:
            raise DataError(
                f"{where}, bucket {number}: must list every sample once, got {repeated} repeated. Remove "
                "the repetitions."
            )
