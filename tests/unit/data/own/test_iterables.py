"""Which object is taken how, and items pass after pass from a known position."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

from aiprod_ds.data.own.items import AUDIO
from aiprod_ds.data.own.iterables import (
    ClipIterable,
    ItemPasses,
    Mark,
    Source,
    mark_from_dict,
    mark_to_dict,
    shuffled_dataset,
    source_of,
)
from aiprod_ds.errors import CheckpointError, DataError

SOUNDS = [torch.full((4,), float(number)) for number in range(7)]


class Listed:
    def __init__(self, elements: list[Any]) -> None:
        self.elements = elements

    def __iter__(self) -> Iterator[Any]:
        yield from self.elements


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from SOUNDS

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError  # torch's own class has the method, too

    def __len__(self) -> int:
        return len(SOUNDS)


class Counted(Listed):
    """Counts on where it was left, as the simplest stateful loaders do."""

    done = 0

    def __iter__(self) -> Iterator[Any]:
        while self.done < len(self.elements):
            self.done += 1
            yield self.elements[self.done - 1]
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]


def _source(dataset: Any) -> Source:
    found = source_of(dataset)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "dataset", [SOUNDS, torch.zeros(3, 4), np.zeros((3, 4)), TensorDataset(torch.zeros(3, 4)), ()]
)
def test_map_style_datasets_are_none_of_these(dataset: Any) -> None:
    assert source_of(dataset) is None


@pytest.mark.parametrize(
    ("make", "is_batch", "is_collated", "is_sharded", "is_stateful"),
    [
        (lambda: Listed(SOUNDS), None, False, False, False),
        (Streamed, None, False, False, False),
        (lambda: ClipIterable(SOUNDS), None, False, False, False),
        (lambda: Counted(SOUNDS), None, False, False, True),
        (lambda: DataLoader(SOUNDS, batch_size=2), True, True, False, False),  # type: ignore[arg-type]
        (lambda: DataLoader(SOUNDS, batch_size=2, collate_fn=list), True, False, False, False),  # type: ignore[arg-type]
        (lambda: DataLoader(Streamed(), batch_size=None), None, False, False, False),
        (
            lambda: DataLoader(
                SOUNDS,  # type: ignore[arg-type]
                sampler=DistributedSampler(SOUNDS, num_replicas=2, rank=0),  # type: ignore[arg-type]
            ),
            True,
            True,
            True,
            False,
        ),
        (lambda: ClipIterable(Listed(SOUNDS), yields="batches", each_rank="own"), True, False, True, False),
        (lambda: ClipIterable(DataLoader(Streamed()), yields="items"), False, False, False, False),
    ],
)
def test_iterables_are_read_as_what_they_are(
    make: Callable[[], Any], is_batch: bool | None, is_collated: bool, is_sharded: bool, is_stateful: bool
) -> None:
    source = _source(make())
    assert (source.is_batch, source.is_collated) == (is_batch, is_collated)
    assert (source.is_sharded, source.is_stateful) == (is_sharded, is_stateful)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((sound for sound in SOUNDS), "must give a new iterator for each pass, got generator"),
        (iter(SOUNDS), "got list_iterator, which runs out. Pass an object whose __iter__ starts anew"),
        (7, "must be a map-style dataset .* got int"),
        ({"video": SOUNDS}, "got dict"),
        ("clips", "got str"),
    ],
)
def test_what_is_neither_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source_of(dataset)


@pytest.mark.parametrize("setting", [{"yields": "clips"}, {"each_rank": "some"}, {"on_resume": None}])
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"ClipIterable: {next(iter(setting))} must be one of"):
        ClipIterable(SOUNDS, **setting)


def test_only_a_loader_that_shuffles_and_nothing_else_is_read_by_the_runs_own_sampler() -> None:
    plain = DataLoader(SOUNDS, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    assert shuffled_dataset(plain) is SOUNDS
    assert shuffled_dataset(DataLoader(SOUNDS, batch_size=None, shuffle=True)) is SOUNDS  # type: ignore[arg-type]
    others: list[Any] = [
        SOUNDS,
        DataLoader(SOUNDS, batch_size=2),  # type: ignore[arg-type]
        DataLoader(SOUNDS, shuffle=True, collate_fn=list),  # type: ignore[arg-type]
        DataLoader(SOUNDS, shuffle=True, generator=torch.Generator()),  # type: ignore[arg-type]
        DataLoader(SOUNDS, shuffle=True, num_workers=1, worker_init_fn=print),  # type: ignore[arg-type]
        DataLoader(SOUNDS, sampler=RandomSampler(SOUNDS, num_samples=3)),  # type: ignore[arg-type]
        DataLoader(SOUNDS, sampler=RandomSampler(SOUNDS, replacement=True)),  # type: ignore[arg-type]
        ClipIterable(plain),
    ]
    assert [shuffled_dataset(other) for other in others] == [None] * len(others)


def _passes(source: Source, *, phase: int = 0, rank: int = 0) -> ItemPasses:
    return ItemPasses(source, AUDIO, names=(5, phase), rank=rank)


def _taken(passes: ItemPasses, count: int) -> list[tuple[int, int, float]]:
    return [(epoch, number, float(item[0])) for epoch, number, item in (passes.take() for _ in range(count))]


@pytest.mark.parametrize("make", [Listed, Counted])
def test_passes_follow_one_another_and_a_position_is_reached_again(make: Callable[..., Any]) -> None:
    passes = _passes(_source(make(SOUNDS)))
    taken = _taken(passes, 9)
    assert taken == [(0, number, float(number)) for number in range(7)] + [(1, 0, 0.0), (1, 1, 1.0)]
    passes.mark()
    mark = passes.mark_before(1, 2)
    assert mark is not None
    assert (mark.state is None) == (make is Listed)
    assert (mark.epoch, mark.number) == ((1, 0) if make is Listed else (1, 2))

    again = _passes(_source(make(SOUNDS)))
    again.go_to(mark_from_dict(mark_to_dict(mark)))
    skipped = 2 - mark.number
    assert _taken(again, skipped + 6)[skipped:] == _taken(passes, 6)


def test_the_end_of_a_pass_is_seen_before_the_next_item_is_taken() -> None:
    passes = _passes(_source(Listed(SOUNDS[:2])))
    _taken(passes, 2)
    assert passes.epoch == 0
    passes.settle()
    assert (passes.epoch, passes.number) == (1, 0)


def test_marks_that_nobody_needs_are_forgotten() -> None:
    passes = _passes(_source(Counted(SOUNDS)))
    for _ in range(5):
        _taken(passes, 1)
        passes.mark()
    assert passes.mark_before(0, 3) == Mark(0, 3, 3, passes.marks[0].state)
    assert [mark.number for mark in passes.marks] == [3, 4, 5]


def test_every_phase_begins_with_the_state_that_the_first_began_with() -> None:
    source = _source(Counted(SOUNDS))
    assert _taken(_passes(source), 3)[-1] == (0, 2, 2.0)
    assert _taken(_passes(source, phase=1), 1) == [(0, 0, 0.0)]


def test_an_iterable_without_items_is_named() -> None:
    with pytest.raises(DataError, match="must give at least one item a pass, got none in pass 1"):
        _passes(_source(Listed([]))).take()


class Noisy(Listed):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for sound in self.elements:
            yield sound + torch.rand(1) + float(np.random.rand()) + random.random()


def test_the_code_of_an_iterable_draws_the_same_and_leaves_the_streams_of_training() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    source = _source(Noisy(SOUNDS))
    first = _taken(_passes(source), 9)
    torch.rand(3)
    again = _passes(source)
    assert _taken(again, 9) == first
    assert first[:2] != first[7:], "another pass has other streams"
    assert _taken(_passes(source, phase=1), 9) != first
    assert _taken(_passes(source, rank=1), 9) == first, "ranks that read the same must draw the same"
    own = _source(ClipIterable(Noisy(SOUNDS), each_rank="own"))
    assert _taken(_passes(own, rank=1), 9) != _taken(_passes(own, rank=0), 9)
    torch.set_rng_state(before[0])
    _taken(_passes(source), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_samplers_and_datasets_are_told_the_pass() -> None:
    class Told(Streamed):
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    dataset = Told()
    _taken(_passes(_source(DataLoader(dataset, batch_size=2))), 15)
    assert dataset.epochs == [0, 1, 2]


def test_a_damaged_mark_is_named() -> None:
    with pytest.raises(CheckpointError, match="a mark must have"):
        mark_from_dict({"epoch": 0})


@pytest.mark.parametrize(("workers", "is_warned"), [(0, False), (1, False), (2, True)])
def test_workers_that_may_all_give_the_same_items_are_told_of(workers: int, is_warned: bool) -> None:
    source = source_of(DataLoader(Streamed(), batch_size=2, num_workers=workers))
    assert source is not None
    told = [words for words in source.words() if "get_worker_info" in words]
    assert [f"every clip comes {workers} times a pass" in words for words in told] == [True] * is_warned
    (read,) = [words for words in source.words() if words not in told]
    assert "in its own order" in read
