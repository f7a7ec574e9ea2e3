"""Micro-batches of one rank out of an iterable: the same outward form as `aiprod_ds.data.loader`.

Owns which item makes which update, and what of that a checkpoint must hold. Items keep their order; each goes
to the bucket that fits it best, or, where buckets have shares, to the next update of a bucket that it is long
enough for. An update consists of the next items of its bucket, whatever the batches of a loader are. All
ranks decide alike: they see the same items, or each its own and then the order of buckets does not depend on
items.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aiprod_ds.curriculum.data_rules import ClipFacts
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan
from aiprod_ds.data.bucket_order import ShareOrder
from aiprod_ds.data.buckets import best_bucket, long_enough
from aiprod_ds.data.dataset import ClipRequest, ClipSample, ItemReader
from aiprod_ds.data.loader import Draw, MicroBatch, no_draws
from aiprod_ds.data.own.iterables import ItemPasses, Source, Taken, mark_from_dict, mark_to_dict
from aiprod_ds.data.own.values import ValueCheck
from aiprod_ds.data.sampler import SampleRef
from aiprod_ds.errors import CheckpointError, DataError

_LOG = logging.getLogger(__name__)
_MAX_WAITING_BATCHES = 2  # of items that wait for a bucket of another length; older ones are left out


class _Entry(NamedTuple):
    """An item that was taken and not trained on yet; `sample` is None where another rank has it."""

    taken: Taken
    sample: ClipSample | None


class _Update(NamedTuple):
    bucket: int
    entries: list[_Entry]
    completed: int


class _Record(NamedTuple):
    """Where the items stand before an update."""

    epoch: int
    number: int
    waiting: list[tuple[int, int]]
    completed: int
    last: Taken | None

    @property
    def oldest(self) -> tuple[int, int]:
        """Pass and number of the first item that is still to be trained on."""
        return min([(self.epoch, self.number), *self.waiting])


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlace:
    """Which part of a phase a loader delivers.

    Attributes:
        phase: With its buckets.
        seed: Of the run.
        rank: 0 <= rank < world_size.
        world_size: Ranks that share every global batch.
        start_position: The first update to deliver.
    """

    phase: PhasePlan
    seed: int
    rank: int
    world_size: int
    start_position: int


class StreamLoader:
    """Infinite iterator over the micro-batches of one rank; it reads in the process that trains.

    Args:
        source: What is iterated over.
        reader: Makes clips of its items.
        place: Which part is delivered.
        draw: Adds what chance decides.
        agree: Whether all ranks say yes; asked once an update where each rank has items of its own and their
            passes end the phase. None: this rank's passes count.

    Raises:
        DataError: When iterating, if an item is no clip, no item fits a bucket, or the first items' values
            cannot be right.
    """

    def __init__(
        self,
        source: Source,
        reader: ItemReader,
        place: StreamPlace,
        *,
        draw: Draw = no_draws,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        phase = place.phase
        self._source = source
        self._reader = reader
        self._place = place
        self._buckets = phase.buckets
        self._draw = draw
        self._agree = agree
        self._passes = ItemPasses(source, reader.kind, names=(place.seed, phase.index), rank=place.rank)
        self._streams = place.world_size if source.is_sharded else 1
        self._order = _share_order(phase, place.seed)
        self._queues: tuple[list[_Entry], ...] = tuple([] for _ in phase.buckets)
        self._waiting: list[tuple[Taken, ClipFacts]] = []
        self._records: dict[int, _Record] = {}
        self._updates: dict[int, _Update] = {}
        self._next = place.start_position
        self._completed = 0
        self._used = 0
        self._left_out = 0
        self._last: Taken | None = None
        self._check: ValueCheck | None = ValueCheck(reader.kind.key, reader.value_range)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches from the start position on, without end."""
        position = self._place.start_position
        while True:
            self._prepare(position)
            yield from self._micro_batches(position, self._updates[position])
            position += 1

    def bucket_at(self, position: int) -> int:
        """Returns the bucket of an update: the last one that was delivered, or the next."""
        self._prepare(position)
        return self._updates[position].bucket

    def epoch_at(self, position: int) -> int:
        """Returns the passes that are complete before an update that follows one that was delivered."""
        return self._updates[position - 1].completed

    def leave_out(self, names: Collection[str]) -> None:
        """Does nothing: no item is replaced, one that cannot be read ends the run."""

    def close(self) -> None:
        """Lets go of the iterable. Idempotent."""
        self._passes.close()

    def state_at(self, position: int) -> Mapping[str, Any]:
        """Returns, JSON-ready, what a resumed run needs of this rank to begin at `position`: that of the last
        update that was begun, or the next."""
        record = self._records[position] if position in self._records else self._record()
        mark = self._passes.mark_before(*record.oldest)
        return {
            "is_shared": not self._source.is_sharded,
            "phase": self._place.phase.index,
            "initial": self._source.initial_state,
            "next": [record.epoch, record.number],
            "waiting": [list(place) for place in record.waiting],
            "completed": record.completed,
            "mark": None if mark is None else mark_to_dict(mark),
            "last": None if record.last is None else self._digest(record.last),
        }

    def restore(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Goes to where `state_at` was asked, before the first update is read; in a later phase, begins with
        the state that the first phase began with.

        Args:
            ranks: What each rank's `state_at` gave; empty if the run had no iterable then.

        Raises:
            DataError: If the iterable does not give the items that it gave before.
            CheckpointError: If the state is damaged, or does not say where this rank's own items stand.
        """
        if not self._source.is_stateful and not self._source.is_replayed:
            _LOG.warning("dataset_anew position=%d", self._place.start_position)
            return
        state = self._own_state(ranks)
        if self._source.is_stateful:
            self._source.remember_initial(state.get("initial"))
        if state.get("phase") != self._place.phase.index or not self._place.start_position:
            return
        try:
            target, mark = tuple(state["next"]), state["mark"]
            wanted = {tuple(place) for place in state["waiting"]}
            self._completed, last = state["completed"], state["last"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"state.json: streams: {error!r}. It is damaged.") from error
        if mark is None:
            return
        self._passes.go_to(mark_from_dict(mark))
        taken: Taken | None = None
        while (place := self._settled()) < target:
            taken = self._passes.take()
            if place in wanted:
                self._keep(taken)
        is_other = taken is not None and last is not None and self._digest(taken) != last
        if place != target or is_other:
            raise DataError(
                "dataset: must give the items that it gave before the checkpoint, got others in pass "
                f"{target[0] + 1} before item {target[1]}. Give it state_dict and load_state_dict, or an "
                "order that is the same each time, or pass ClipIterable(..., on_resume='anew')."
            )
        self._last = taken

    def _own_state(self, ranks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        if not ranks:
            raise CheckpointError(
                "dataset: must be map-style as it was when the checkpoint was saved, got an iterable. Pass "
                "what the run had, or ClipIterable(..., on_resume='anew')."
            )
        if not self._source.is_sharded and all(state.get("is_shared") for state in ranks):
            return ranks[0]
        if self._source.is_sharded and len(ranks) == self._place.world_size:
            return ranks[self._place.rank]
        raise CheckpointError(
            f"dataset: must be shared among ranks as it was when {len(ranks)} of them saved the checkpoint, "
            f"got {self._place.world_size} ranks, each with "
            f"{'its own items' if self._source.is_sharded else 'all items'}. Start as many ranks, or pass "
            "ClipIterable(..., on_resume='anew')."
        )

    def _settled(self) -> tuple[int, int]:
        self._passes.settle()
        return self._passes.epoch, self._passes.number

    def _digest(self, taken: Taken) -> int:
        """Returns a checksum of an item's values."""
        values = self._reader.values(taken.item, "dataset").detach().cpu().contiguous()
        return zlib.crc32(values.flatten().view(torch.uint8).numpy().data)

    def _record(self) -> _Record:
        queued = [(entry.taken.epoch, entry.taken.number) for queue in self._queues for entry in queue]
        queued += [(taken.epoch, taken.number) for taken, _ in self._waiting]
        return _Record(self._passes.epoch, self._passes.number, sorted(queued), self._completed, self._last)

    def _prepare(self, position: int) -> None:
        """Reads the items of an update unless they are there already, and looks whether the pass is over."""
        if position in self._updates:
            return
        assert position == self._next, f"updates are read one after the other, at {self._next}: {position}"
        record = self._record()
        self._records = {position: record}
        self._passes.mark_before(*record.oldest)
        self._passes.mark()
        bucket, entries = self._collect(position)
        self._passes.settle()
        self._judge_first()
        before = self._updates.get(position - 1)
        self._updates = {position: _Update(bucket, entries, self._passes_completed())}
        if before is not None:
            self._updates[position - 1] = _Update(before.bucket, [], before.completed)
        self._next += 1

    def _passes_completed(self) -> int:
        if self._agree is None:
            self._completed = self._passes.epoch
        else:
            while self._agree(self._passes.epoch > self._completed):
                self._completed += 1
        return self._completed

    def _collect(self, position: int) -> tuple[int, list[_Entry]]:
        """Returns the bucket of the update at `position`, and its items in the order of the global batch."""
        if self._order is not None:
            return self._collect_for(self._order.turn(position).bucket)
        began, used = self._passes.epoch, self._used
        while True:
            for bucket, queue in enumerate(self._queues):
                if len(queue) >= self._needed(bucket):
                    entries = queue[:]
                    queue.clear()
                    return bucket, entries
            self._keep(self._passes.take())
            self._require_use(began, used)

    def _collect_for(self, bucket: int) -> tuple[int, list[_Entry]]:
        entries: list[_Entry] = []
        began, used = self._passes.epoch, self._used
        kept, self._waiting = self._waiting, []
        for taken, facts in kept:
            if len(entries) < self._needed(bucket) and _fits(facts, self._buckets[bucket]):
                entries.append(self._entry(taken, bucket, len(entries)))
            else:
                self._waiting.append((taken, facts))
        while len(entries) < self._needed(bucket):
            taken = self._passes.take()
            facts = self._facts(taken)
            if _fits(facts, self._buckets[bucket]):
                entries.append(self._entry(taken, bucket, len(entries)))
            else:
                self._wait(taken, facts)
            self._require_use(began, used)
        return bucket, entries

    def _keep(self, taken: Taken) -> None:
        """Puts an item where its bucket's next update finds it."""
        facts = self._facts(taken)
        if self._order is not None:
            self._wait(taken, facts)
            return
        bucket = best_bucket(facts, self._buckets)
        if bucket is None:
            self._leave_out(facts)
        else:
            queue = self._queues[bucket]
            queue.append(self._entry(taken, bucket, len(queue)))

    def _wait(self, taken: Taken, facts: ClipFacts) -> None:
        if not any(_fits(facts, bucket) for bucket in self._buckets):
            self._leave_out(facts)
            return
        self._waiting.append((taken, facts))
        most = max(shape.global_batch_size for shape in self._buckets)
        if len(self._waiting) > _MAX_WAITING_BATCHES * most:
            self._leave_out(self._waiting.pop(0)[1])

    def _leave_out(self, facts: ClipFacts) -> None:
        self._left_out += 1
        if self._left_out == 1:
            _LOG.warning(
                "item_left_out name=%r reason=%s", facts.name,
                "no bucket takes clips of its length, or none in time; others like it are not named",
            )  # fmt: skip

    def _require_use(self, began: int, used: int) -> None:
        """Looks whether a whole pass since `began` had nothing to train on: no more than `used` before."""
        if self._used == used and self._passes.epoch >= began + 2:
            asked = " or ".join(bucket.length_text for bucket in self._buckets)
            raise DataError(
                f"dataset: must give clips of at least {asked}, got none in a whole pass. Shorten the "
                "phase's clips or give longer ones."
            )

    def _facts(self, taken: Taken) -> ClipFacts:
        name = _name(taken)
        if self._check is not None and not self._check.is_full:
            self._check.see(self._reader.values(taken.item, name), name)
        self._last = taken
        return self._reader.facts(taken.item, name)

    def _judge_first(self) -> None:
        if self._check is not None:
            self._check.judge()
            self._check = None

    def _needed(self, bucket: int) -> int:
        return self._buckets[bucket].global_batch_size // self._streams

    def _entry(self, taken: Taken, bucket: int, place: int) -> _Entry:
        self._used += 1
        if not self._source.is_sharded and place % self._place.world_size != self._place.rank:
            return _Entry(taken._replace(item=None), None)
        shape = self._buckets[bucket]
        request = ClipRequest(
            sample_index=self._global_number(taken),
            epoch=taken.epoch,
            frames=shape.frames,
            height=shape.height,
            width=shape.width,
            frame_rate_hz=shape.frame_rate_hz,
            augment=True,
            flip=self._place.phase.random_flip,
        )
        sample = self._reader.clip(taken.item, request, _name(taken))
        return _Entry(taken._replace(item=None), sample)

    def _global_number(self, taken: Taken) -> int:
        """Returns which item of its pass it is, over all ranks: of random draws it is the name."""
        if not self._source.is_sharded:
            return taken.number
        return taken.number * self._place.world_size + self._place.rank

    def _micro_batches(self, position: int, update: _Update) -> Iterator[MicroBatch]:
        bucket, world_size = self._buckets[update.bucket], self._place.world_size
        own = [
            (ordinal, entry.taken, entry.sample)
            for ordinal, entry in enumerate(update.entries)
            if entry.sample is not None
        ]
        if self._source.is_sharded:
            own = [(place * world_size + self._place.rank, *rest) for place, *rest in own]  # type: ignore[misc]
        size = bucket.micro_batch_size
        assert len(own) == size * bucket.accumulation, f"{len(own)} clips for {bucket.shape_text}"
        for start in range(0, len(own), size):
            part = own[start : start + size]
            tensors = _stacked([sample for _, _, sample in part])
            places = [(self._place.phase.index, position, ordinal) for ordinal, _, _ in part]
            batch = MicroBatch(
                tensors={**tensors, **self._draw(tensors, places)},
                samples=[SampleRef(self._global_number(taken), taken.epoch, n) for n, taken, _ in part],
                bucket=update.bucket,
                position=position,
            )
            yield batch.pin_memory() if torch.cuda.is_available() else batch


def _share_order(phase: PhasePlan, seed: int) -> ShareOrder | None:
    shares = [bucket.share for bucket in phase.buckets if bucket.share is not None]
    if not shares:
        return None
    # How many samples there are only says how long a pass is, which the iterable itself says here.
    sizes = [(1, bucket.global_batch_size) for bucket in phase.buckets]
    return ShareOrder(sizes, shares, num_samples=1, seed=seed, phase=phase.index)


def _fits(facts: ClipFacts, bucket: BucketPlan) -> bool:
    return bool(long_enough([facts], bucket))


def _name(taken: Taken) -> str:
    return f"dataset, item {taken.number} of pass {taken.epoch + 1}"


def _stacked(samples: Sequence[ClipSample]) -> dict[str, Tensor]:
    try:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    except (RuntimeError, KeyError) as error:
        raise DataError(
            f"dataset: the clips of a batch must hold tensors of the same names and shapes, got: {error}. "
            "Make the items alike."
        ) from error
