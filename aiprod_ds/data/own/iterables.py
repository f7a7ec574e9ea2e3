"""What a user's program may iterate over, and its items one by one, pass after pass, from a known position.

Owns which object is taken how, the random streams under which its code runs, and the marks from which a
position is reached again. Which items make which update is `stream_loader.py`'s.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate, default_convert

from aiprod_ds.data.own.items import ItemKind, items_of
from aiprod_ds.data.own.saved_state import decode_state, encode_state
from aiprod_ds.errors import CheckpointError, DataError
from aiprod_ds.rng import stream_seed

_STATE_METHODS = ("state_dict", "load_state_dict")


class ClipIterable:
    """An iterable of clips with what cannot be seen from outside. Pass it as `dataset` of a trainer.

    Without it an iterable is taken as the defaults here say.

    Args:
        iterable: Gives a new iterator whenever one is asked for: an `IterableDataset`, a `DataLoader`, or an
            object with `__iter__`. What `state_dict` and `load_state_dict` it has, as torchdata's
            `StatefulDataLoader` has them, keep its position in checkpoints.
        yields: `items` or `batches`; None: a loader with a batch size yields batches, of others the shape
            tells.
        each_rank: `same`: every rank iterates over the same items in the same order and trains on its part
            of them. `own`: every rank iterates over its own part already. None: `own` for a loader whose
            sampler has `num_replicas`, as a DistributedSampler has, else `same`.
        on_resume: Without those methods: `replay` iterates from the beginning of the pass again and skips
            what was consumed, which is exact if the order is the same each time; `anew` begins a new pass.
    """

    def __init__(
        self,
        iterable: Any,
        *,
        yields: Literal["items", "batches"] | None = None,
        each_rank: Literal["same", "own"] | None = None,
        on_resume: Literal["replay", "anew"] = "replay",
    ) -> None:
        for name, value, allowed in (
            ("yields", yields, ("items", "batches", None)),
            ("each_rank", each_rank, ("same", "own", None)),
            ("on_resume", on_resume, ("replay", "anew")),
        ):
            if value not in allowed:
                raise DataError(f"ClipIterable: {name} must be one of {allowed}, got {value!r}. Correct it.")
        self.iterable = iterable
        self.yields = yields
        self.each_rank = each_rank
        self.on_resume = on_resume


@dataclass(slots=True, kw_only=True)
class Source:
    """A user's iterable and how it is read.

    Attributes:
        is_batch: Whether its elements are batches; None: as their shapes say.
        is_collated: Whether torch's `default_collate` makes them.
        is_sharded: Whether each rank has items of its own.
        is_replayed: Whether, without a state, a resumed run skips what was consumed.
        is_stateful: Whether it has a state to save.
        batch_size: Of its batches; None where it does not say.
    """

    iterable: Any
    is_batch: bool | None
    is_collated: bool
    is_sharded: bool
    is_replayed: bool
    is_stateful: bool
    batch_size: int | None
    _initial: Any = field(default=None, repr=False)

    @property
    def initial_state(self) -> Any:
        """The state that each phase begins with; None where there is none."""
        return self._initial

    def remember_initial(self, state: Any = None) -> None:
        """Remembers a saved state as that, or the state that the object has now, the first time."""
        if state is not None:
            self._initial = state
        elif self._initial is None:
            self._initial = encode_state(self.iterable.state_dict())

    def words(self) -> tuple[str, ...]:
        """Returns what a user should know of how it is read."""
        if self.is_stateful:
            resumed = "has state_dict, so a resumed run goes on where it was"
        elif self.is_replayed:
            resumed = (
                "has no state_dict, so a resumed run reads its pass from the beginning and skips what was "
                "consumed; that is exact if it gives the same items in the same order"
            )
        else:
            resumed = "begins a new pass when a run resumes"
        ranks = (
            "each rank is taken to have items of its own"
            if self.is_sharded
            else "each rank reads all of it and trains on its part"
        )
        read = f"dataset: an iterable, read in its own order in the training process; it {resumed}; {ranks}"
        return (read, *self._words_of_workers())

    def _words_of_workers(self) -> tuple[str, ...]:
        loader = self.iterable
        if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, IterableDataset):
            return ()
        if loader.num_workers < 2:
            return ()
        words = (
            f"dataset: each of its {loader.num_workers} workers iterates over the dataset, which must share "
            "its items out by torch.utils.data.get_worker_info(); if it does not, every clip comes "
            f"{loader.num_workers} times a pass"
        )
        return (words,)


def source_of(dataset: Any) -> Source | None:
    """Returns how an iterable is read; None for a map-style dataset.

    Raises:
        DataError: If it is neither, or can be iterated over only once.
    """
    wrapped = dataset if isinstance(dataset, ClipIterable) else ClipIterable(dataset)
    iterable = wrapped.iterable
    if wrapped is not dataset and _is_map_style(iterable):
        return None
    if not hasattr(iterable, "__iter__") or isinstance(iterable, Mapping | str | bytes):
        raise DataError(
            "dataset: must be a map-style dataset (with __len__ and __getitem__), an IterableDataset, a "
            f"DataLoader or an object with __iter__, got {type(iterable).__name__}. Pass one of these."
        )
    if hasattr(iterable, "__next__"):
        raise DataError(
            f"dataset: must give a new iterator for each pass, got {type(iterable).__name__}, which runs "
            "out. Pass an object whose __iter__ starts anew, such as a class around the generator."
        )
    is_loader = getattr(iterable, "batch_size", None) is not None or (
        getattr(iterable, "batch_sampler", None) is not None
    )
    is_batch = True if wrapped.yields is None and is_loader else None
    if wrapped.yields is not None:
        is_batch = wrapped.yields == "batches"
    is_sharded = _says_it_shards(iterable) if wrapped.each_rank is None else wrapped.each_rank == "own"
    batch_size = getattr(iterable, "batch_size", None)
    return Source(
        iterable=iterable,
        is_batch=is_batch,
        is_collated=bool(is_batch) and getattr(iterable, "collate_fn", None) is default_collate,
        is_sharded=is_sharded,
        is_replayed=wrapped.on_resume == "replay",
        is_stateful=all(callable(getattr(iterable, name, None)) for name in _STATE_METHODS),
        batch_size=batch_size if isinstance(batch_size, int) else None,
    )


def shuffled_dataset(loader: Any) -> Any:
    """Returns the map-style dataset of a plain DataLoader that shuffles it and does nothing else; None for
    any other object.

    Such a loader says no more than that its items come in random order, which the run's own sampler does
    with exact positions and for any number of ranks.
    """
    is_plain = (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler) is RandomSampler
        and not loader.sampler.replacement
        and loader.generator is None
        and loader.collate_fn in (default_collate, default_convert)
        and loader.worker_init_fn is None
        and _is_map_style(loader.dataset)
        and loader.sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]  # map-style
    )
    return loader.dataset if is_plain else None


def _is_map_style(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset | DataLoader | Mapping | str | bytes):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _says_it_shards(iterable: Any) -> bool:
    return any(hasattr(part, "num_replicas") for part in _samplers(iterable))


def _samplers(iterable: Any) -> list[Any]:
    batch_sampler = getattr(iterable, "batch_sampler", None)
    found = (getattr(iterable, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return [part for part in found if part is not None]


class Taken(NamedTuple):
    """An item, and which of its pass it is."""

    epoch: int
    number: int
    item: Any


class Mark(NamedTuple):
    """A place between two elements of a pass from which the passes can go on.

    Attributes:
        epoch: The pass.
        element: How many of its elements come before.
        number: How many of its items come before.
        state: Of the iterable there; None: it is reached from the beginning of the pass.
    """

    epoch: int
    element: int
    number: int
    state: Any


class ItemPasses:
    """The items of an iterable, pass after pass.

    The iterable's own code runs under random streams of (seed, phase, pass, element), so that its shuffling
    and augmentation in this process are the same after a resume, and leaves the streams of training as they
    are.

    Args:
        source: What is iterated over.
        kind: Of the items.
        names: Of the random streams: the run's seed and the phase.
        rank: Of this process; its streams are the same as other ranks' unless each has items of its own.
    """

    def __init__(self, source: Source, kind: ItemKind, *, names: tuple[int, int], rank: int) -> None:
        self._source = source
        self._kind = kind
        self._names = (*names, rank if source.is_sharded else 0)
        self._iterator: Iterator[Any] | None = None
        self._items: deque[Any] = deque()
        self._is_first = True
        self._element = 0
        self.epoch = 0
        self.number = 0
        self.marks: list[Mark] = []
        if source.is_stateful:
            # Before a checkpoint's state is loaded, and of no phase: it is the same in every process.
            with _streams_of(stream_seed(names[0], "own_data")):
                source.remember_initial()

    def settle(self) -> None:
        """Makes sure that there is a next item, so that `epoch` is the pass that it is in and `number` its
        place there.

        Raises:
            DataError: If a pass has no item.
        """
        while not self._items:
            self._pull()

    def take(self) -> Taken:
        """Returns the next item.

        Raises:
            DataError: If a pass has no item.
        """
        self.settle()
        taken = Taken(self.epoch, self.number, self._items.popleft())
        self.number += 1
        return taken

    def mark(self) -> None:
        """Remembers this place if the iterable can say where it is; the beginnings of passes always are."""
        if self._source.is_stateful and self._iterator is not None:
            state = encode_state(self._source.iterable.state_dict())
            self.marks.append(Mark(self.epoch, self._element, self.number + len(self._items), state))

    def mark_before(self, epoch: int, number: int) -> Mark | None:
        """Returns the last mark from which the item is still to come, and forgets those before it."""
        usable = [mark for mark in self.marks if (mark.epoch, mark.number) <= (epoch, number)]
        if not usable:
            return None
        self.marks = self.marks[len(usable) - 1 :]
        return self.marks[0]

    def go_to(self, mark: Mark) -> None:
        """Goes on from a mark of this run or of the one that is resumed."""
        self.close()
        self.epoch, self._element, self.number = mark.epoch, mark.element, mark.number
        self._begin(mark.state)
        self.marks = [mark]

    def close(self) -> None:
        """Lets go of the iterator. Idempotent."""
        self._iterator = None
        self._items.clear()

    def _pull(self) -> None:
        if self._iterator is None:
            self._begin(self._source.initial_state if self._is_first else None)
            self.marks.append(Mark(self.epoch, 0, 0, self._state()))
        assert self._iterator is not None, "just made"
        try:
            with self._chance(self._element):
                element = next(self._iterator)
        except StopIteration:
            if not self.number:
                raise DataError(
                    f"dataset: must give at least one item a pass, got none in pass {self.epoch + 1}. Its "
                    "__iter__ must start anew whenever it is called."
                ) from None
            self._iterator = None
            self.epoch, self._element, self.number = self.epoch + 1, 0, 0
            return
        self._element += 1
        source = self._source
        self._items.extend(
            items_of(element, self._kind, is_batch=source.is_batch, is_collated=source.is_collated)
        )

    def _begin(self, state: Any) -> None:
        iterable = self._source.iterable
        self._is_first = False
        for part in (*_samplers(iterable), getattr(iterable, "dataset", None), iterable):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(self.epoch)
        with self._chance(-1):
            if state is not None:
                iterable.load_state_dict(decode_state(state))
            self._iterator = iter(iterable)

    def _state(self) -> Any:
        return encode_state(self._source.iterable.state_dict()) if self._source.is_stateful else None

    def _chance(self, element: int) -> AbstractContextManager[None]:
        """Returns the random streams of one element."""
        seed, *names = self._names
        return _streams_of(stream_seed(seed, "own_data", *names, self.epoch, element))


@contextmanager
def _streams_of(seed: int) -> Iterator[None]:
    """Runs the block under the global random streams of one seed, and leaves those of training as they
    are."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def mark_to_dict(mark: Mark) -> dict[str, Any]:
    """Returns a mark JSON-ready."""
    return dict(mark._asdict())


def mark_from_dict(values: Mapping[str, Any]) -> Mark:
    """Returns the mark saved by `mark_to_dict`.

    Raises:
        CheckpointError: If it is none.
    """
    if set(values) != set(Mark._fields):
        raise CheckpointError(
            f"state.json: streams: a mark must have {sorted(Mark._fields)}, got {sorted(values)}. It is "
            "damaged."
        )
    return Mark(**values)
