"""From which bucket each update of a phase comes, and when a pass over the phase's data is complete.
`sampler` picks the samples.

Without shares every sample is in one bucket. Bucket b with n_b samples in batches of B_b has read them e
times after ceil(e * n_b / B_b) updates, so pass e of the phase ends after the sum of these over b. Inside a
pass the buckets are shuffled. Worked number: 10 samples in batches of 4 and 6 in batches of 3 end their
passes after 3 + 2, 5 + 4, 8 + 6 updates.

With shares every bucket has its own endless stream and the order follows the shares alone: after any n
updates bucket b has had n * share_b of them, less than one off. Passes count samples: with N samples in the
phase, pass e ends after ceil(e * N / sum_b(share_b * B_b)) updates.
Worked number: shares 0.2 and 0.8 with batches of 16 and 4 take 6.4 samples an update; 64 samples last 10
updates.

Nothing is left out: what does not fill a batch at the end of a pass is completed with the first samples of
the next one. Everything is a function of (seed, phase, position); caches only make neighbouring positions
cheap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from aiprod_ds.rng import stream_seed

_SHARE_TOLERANCE = 1e-6


class Turn(NamedTuple):
    """One update: which bucket it comes from and how many updates of that bucket came before."""

    bucket: int
    number: int


class BucketOrder(Protocol):
    """The endless sequence of a phase's updates."""

    def turn(self, position: int) -> Turn:
        """Returns the update at `position` >= 0."""

    def updates_in(self, passes: int) -> int:
        """Returns how many updates the first `passes` passes take."""

    def passes_before(self, position: int) -> int:
        """Returns how many passes are complete before the update at `position`; the update belongs to the
        next one."""


class PassOrder:
    """Buckets without shares: every pass reads each sample once.

    Args:
        sizes: Of every bucket, samples and global batch size; one without samples has no turn.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, seed: int, phase: int) -> None:
        self._sizes = tuple(sizes)
        self._names = (seed, "buckets", phase)
        # Exact: a float just below a whole number would lose the pass that ends at a position.
        self._passes_per_update = 1 / sum((Fraction(samples, batch) for samples, batch in sizes), Fraction(0))
        self._pass = self._make_pass(0)

    def turn(self, position: int) -> Turn:
        """See `BucketOrder.turn`."""
        current = self._pass
        if not 0 <= position - current.first < len(current.buckets):
            current = self._pass = self._make_pass(self.passes_before(position))
        offset = position - current.first
        bucket = current.buckets[offset]
        return Turn(bucket, current.before[bucket] + current.places[offset])

    def updates_in(self, passes: int) -> int:
        """See `BucketOrder.updates_in`: the sum of ceil(passes * samples / batch)."""
        return sum(_updates(passes, samples, batch) for samples, batch in self._sizes)

    def passes_before(self, position: int) -> int:
        """See `BucketOrder.passes_before`."""
        if 0 <= position - self._pass.first < len(self._pass.buckets):
            return self._pass.index
        # Rounding up makes passes longer, never shorter, than position * passes_per_update says.
        candidates = range(int(position * self._passes_per_update) + 1)
        return bisect_right(candidates, position, key=self.updates_in) - 1

    def _make_pass(self, index: int) -> _Pass:
        before = [_updates(index, samples, batch) for samples, batch in self._sizes]
        turns = [_updates(index + 1, *size) - first for size, first in zip(self._sizes, before, strict=True)]
        buckets = np.repeat(np.arange(len(turns)), turns)
        if len(turns) > 1:
            np.random.default_rng(stream_seed(*self._names, index)).shuffle(buckets)
        return _Pass(
            index=index, first=sum(before), buckets=buckets.tolist(), places=_places(buckets), before=before
        )


class ShareOrder:
    """Buckets with shares: the same mix at every moment.

    The shares are taken as weights w_b / D with the smallest common D (0.2 and 0.8: 1 and 4 of 5). Earliest
    deadline first spreads w_b updates of every bucket over D, and each such block runs forwards or backwards,
    as the seed says: a fixed alternation could keep step with something else that alternates.
    Source: Baruah, Cohen, Plaxton and Varvel 1996, Proportionate progress, Algorithmica 15, for one
    processor.

    Args:
        sizes: Of every bucket, samples and global batch size.
        shares: Of every bucket, > 0 and together 1; kept to within 1e-6.
        num_samples: Different samples of all buckets together.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        shares: Sequence[float],
        *,
        num_samples: int,
        seed: int,
        phase: int,
    ) -> None:
        self._weights = _weights(shares)
        self._names = (seed, "buckets", phase)
        forwards = _spread(self._weights)
        self._patterns = tuple((order, _places(np.asarray(order))) for order in (forwards, forwards[::-1]))
        self._pattern = (-1, self._patterns[0])  # of the block asked for last: a seed takes a hash
        samples_per_block = sum(
            weight * batch for weight, (_, batch) in zip(self._weights, sizes, strict=True)
        )
        self._updates_per_pass = Fraction(num_samples * len(forwards), samples_per_block)

    def turn(self, position: int) -> Turn:
        """See `BucketOrder.turn`."""
        block, offset = divmod(position, len(self._patterns[0][0]))
        if self._pattern[0] != block:
            self._pattern = (block, self._patterns[stream_seed(*self._names, block) % 2])
        buckets, places = self._pattern[1]
        bucket = buckets[offset]
        return Turn(bucket, block * self._weights[bucket] + places[offset])

    def updates_in(self, passes: int) -> int:
        """See `BucketOrder.updates_in`."""
        return _updates(passes, self._updates_per_pass.numerator, self._updates_per_pass.denominator)

    def passes_before(self, position: int) -> int:
        """See `BucketOrder.passes_before`."""
        return position * self._updates_per_pass.denominator // self._updates_per_pass.numerator


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """The order of one pass: update i is number `before[buckets[i]] + places[i]` of bucket `buckets[i]`."""

    index: int
    first: int
    buckets: list[int]
    places: list[int]
    before: list[int]


def _updates(passes: int, samples: int, batch: int) -> int:
    """Returns ceil(passes * samples / batch)."""
    return -(-passes * samples // batch)


def _places(buckets: npt.NDArray[np.int64]) -> list[int]:
    """Returns, for every entry, how many equal ones stand before it."""
    places = np.empty_like(buckets)
    for bucket in np.unique(buckets):
        chosen = buckets == bucket
        places[chosen] = np.arange(np.count_nonzero(chosen))
    listed: list[int] = places.tolist()
    return listed


def _weights(shares: Sequence[float]) -> list[int]:
    """Returns the smallest positive integers whose parts of their sum are the shares."""
    whole = sum(shares)
    for total in count(len(shares)):
        weights = [max(1, round(share / whole * total)) for share in shares]
        is_close = all(
            abs(share / whole - weight / total) <= _SHARE_TOLERANCE
            for share, weight in zip(shares, weights, strict=True)
        )
        if is_close and sum(weights) == total:
            return weights
    raise AssertionError("positive shares have such weights")


def _spread(weights: Sequence[int]) -> list[int]:
    """Returns each bucket as often as its weight says, so that no part from the start is one update off its
    share."""
    total = sum(weights)
    given = [0] * len(weights)
    order: list[int] = []
    for position in range(total):
        # Another update of these would not put them one ahead of their shares.
        ready = [b for b, weight in enumerate(weights) if given[b] * total < (position + 1) * weight]
        # The one that would first be one behind; of equals the first bucket, on every rank.
        bucket = min(ready, key=lambda b: _updates(given[b] + 1, total, weights[b]))
        given[bucket] += 1
        order.append(bucket)
    return order
