"""Whole training runs on a program's own data: every form of the same clips trains to the same weights, and a
resumed run repeats an uninterrupted one bit for bit, on one and two ranks.

A tiny video VAE trains through two phases of other resolution, length, batch and accumulation. The order of
an iterable is its own, so iterables are compared with one another and map-style datasets with one another.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.own.iterables import ClipIterable
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.errors import CheckpointError, DataError
from aiprod_ds.testing.runs import alike_on_ranks, record_of, series, train_and_resume, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = [pytest.mark.dist, pytest.mark.slow]

EDGE, LAST = 4, 8  # with a checkpoint every 3 updates they stand at 3, 4 (edge), 6 and 8 (end)
RESUMES = {"middle_of_the_first_phase": 3, "edge": EDGE, "middle_of_the_last_phase": 6}
NUM_CLIPS = 10
# As in test_resume.py: two ranks add in another order than one.
RELATIVE_TOLERANCE = 1e-5


def _bytes() -> list[Tensor]:
    """Clips [3,T,H,W] uint8."""
    clips = SyntheticVideoDataset(NUM_CLIPS, 9, 26, 24)
    return [((clips[index] + 1) * 127.5).round().to(torch.uint8) for index in range(NUM_CLIPS)]


def _floats() -> list[Tensor]:
    return [clip.float() / 127.5 - 1 for clip in _bytes()]


class Listed:
    """The least that an iterable is: `__iter__`."""

    def __init__(self, elements: Sequence[Any]) -> None:
        self._elements = elements

    def __iter__(self) -> Iterator[Any]:
        yield from self._elements


class Streamed(IterableDataset[Any]):
    """A torch IterableDataset."""

    def __init__(self, elements: Sequence[Any]) -> None:
        self._elements = elements

    def __iter__(self) -> Iterator[Any]:
        yield from self._elements


class Stateful:
    """A loader with the protocol of torchdata's StatefulDataLoader: shuffled, in batches, from any
    position."""

    def __init__(self, elements: Sequence[Any], batch_size: int = 3) -> None:
        self._elements = elements
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(11)
        self._order: list[int] = []
        self._done = 0
        self.iterated_from: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        if not self._order:
            self._order, self._done = self._shuffled(), 0
        self.iterated_from.append(self._done)
        while self._done < len(self._order):
            chosen = self._order[self._done : self._done + self.batch_size]
            self._done += len(chosen)
            yield torch.stack([self._elements[index] for index in chosen])
        self._order = []

    def _shuffled(self) -> list[int]:
        order: list[int] = torch.randperm(len(self._elements), generator=self._generator).tolist()
        return order

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "order": tuple(self._order), "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._order, self._done = list(state["order"]), state["done"]


class Augmented(Dataset[Tensor]):
    """Clips with noise from the global streams of torch, numpy and random, as transforms draw it."""

    def __len__(self) -> int:
        return NUM_CLIPS

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.rand(1) * 0.1 + float(np.random.rand()) * 0.1 + random.random() * 0.1
        return (_floats()[index] * (1 - noise)).clamp(-1, 1)


def _stacked(clips: list[Tensor]) -> dict[str, Any]:
    """A `collate_fn` of a user's own."""
    return {
        "video": torch.stack(clips),
        "fps": torch.full((len(clips),), 24.0),
        "caption": ["a"] * len(clips),
    }


MAP_STYLE: dict[str, Callable[[], dict[str, Any]]] = {
    "floats": lambda: {"dataset": _floats()},
    "bytes": lambda: {"dataset": _bytes()},
    "bytes_THWC": lambda: {"dataset": [clip.permute(1, 2, 3, 0) for clip in _bytes()]},
    "bytes_TCHW_arrays": lambda: {"dataset": [clip.transpose(0, 1).numpy() for clip in _bytes()]},
    "floats_to_255": lambda: {"dataset": [clip.float() for clip in _bytes()], "value_range": (0, 255)},
    "mappings": lambda: {"dataset": [{"video": clip, "fps": 24.0, "caption": "a"} for clip in _floats()]},
    "one_tensor": lambda: {"dataset": torch.stack(_bytes())},
    "shuffled_loader": lambda: {"dataset": DataLoader(_floats(), batch_size=3, shuffle=True)},  # type: ignore[arg-type]
}
ITERABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "items": lambda: {"dataset": Listed(_floats())},
    "bytes": lambda: {"dataset": Listed(_bytes())},
    "iterable_dataset": lambda: {"dataset": Streamed(_floats())},
    "batches_of_4_and_2": lambda: {"dataset": Listed(torch.stack(_floats()).split(4))},
    "lists": lambda: {"dataset": Listed([_bytes()[:7], _bytes()[7:]])},
    "loader": lambda: {"dataset": DataLoader(_floats(), batch_size=3)},  # type: ignore[arg-type]
    "loader_of_iterable_dataset": lambda: {"dataset": DataLoader(Streamed(_bytes()), batch_size=5)},
    "loader_without_batches": lambda: {"dataset": DataLoader(Streamed(_bytes()), batch_size=None)},
    "loader_with_workers": lambda: {"dataset": DataLoader(Streamed(_bytes()), batch_size=4, num_workers=1)},
    "own_collate": lambda: {"dataset": DataLoader(_floats(), batch_size=4, collate_fn=_stacked)},  # type: ignore[arg-type]
    "lists_of_a_loader": lambda: {"dataset": DataLoader(_floats(), batch_size=3, collate_fn=list)},  # type: ignore[arg-type]
}
# Each form of a resumed run's data, and what tells that it was really read as that form.
RESUMED: dict[str, Callable[[], Any]] = {
    "plain": lambda: Listed(_bytes()),
    "stateful": lambda: Stateful(_floats()),
    "shuffled_stream": lambda: ClipIterable(
        DataLoader(Augmented(), batch_size=3, sampler=RandomSampler(range(NUM_CLIPS)))
    ),
    "mixed_lengths": lambda: Listed(_of_two_lengths()),
    "own_part": lambda: ClipIterable(Listed(_bytes()[dist.rank() :: dist.world_size()]), each_rank="own"),
    "distributed_sampler": lambda: DataLoader(
        _bytes(),  # type: ignore[arg-type]
        batch_size=2,
        sampler=DistributedSampler(
            _bytes(),  # type: ignore[arg-type]
            num_replicas=dist.world_size(),
            rank=dist.rank(),
        ),
    ),
}


def _of_two_lengths() -> list[Tensor]:
    """Clips of which two of three have the length of the longer bucket, wide or high."""
    return [
        clip[:, : 5 if index % 3 == 0 else 9, : (16 if index % 2 else 26)]
        for index, clip in enumerate(_bytes())
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], dict[str, Any]]], Any]:
    """Returns the record of a run of each form, trained once."""
    known: dict[str, Any] = {}

    def train(name: str, make: Callable[[], dict[str, Any]]) -> Any:
        if name not in known:
            with dist.process_group(), without_plots():
                known[name] = _train(make, tmp_path_factory.mktemp(name) / "run")
        return known[name]

    return train


def _forms(known: Mapping[str, Any], reference: str, *, usual: set[str]) -> list[Any]:
    """Returns the forms to compare with a reference; all but the usual ones are exhaustive."""
    return [
        pytest.param(form, marks=() if form in usual else pytest.mark.exhaustive)
        for form in known
        if form != reference
    ]


@pytest.mark.parametrize("form", _forms(MAP_STYLE, "floats", usual={"bytes", "shuffled_loader"}))
def test_map_style_datasets_of_the_same_clips_train_alike(trained: Callable[..., Any], form: str) -> None:
    reference = trained("map_floats", MAP_STYLE["floats"])
    assert len(set(series(reference, "loss/total"))) == LAST, "otherwise the comparison shows nothing"
    assert trained(f"map_{form}", MAP_STYLE[form])["sha256"] == reference["sha256"]


@pytest.mark.parametrize(
    "form", _forms(ITERABLE, "items", usual={"bytes", "loader", "batches_of_4_and_2", "loader_with_workers"})
)
def test_iterables_of_the_same_clips_train_alike(trained: Callable[..., Any], form: str) -> None:
    reference = trained("items", ITERABLE["items"])
    assert reference["sha256"] != trained("map_floats", MAP_STYLE["floats"])["sha256"], "another order"
    assert trained(form, ITERABLE[form])["sha256"] == reference["sha256"]


def test_the_report_says_how_an_iterable_is_read(trained: Callable[..., Any]) -> None:
    plain = trained("items", ITERABLE["items"])["replacements"]
    assert "has no state_dict, so a resumed run reads its pass from the beginning" in plain[0]
    loader = trained("loader", ITERABLE["loader"])["replacements"]
    assert "dataset: batches of 3 are cut and stacked anew, in order, to micro-batches of 4" in loader
    shuffled = trained("map_shuffled_loader", MAP_STYLE["shuffled_loader"])["replacements"]
    assert any("read by the run's own sampler" in note for note in shuffled)


CASES = [
    pytest.param(
        world,
        form,
        resumed,
        marks=() if (number + world + place) % len(RESUMES) == 0 else pytest.mark.exhaustive,
    )
    for world in (1, 2)
    for number, form in enumerate(RESUMED)
    for place, resumed in enumerate(RESUMES)
]


@pytest.fixture(scope="module")
def runs(
    points_to_resume: Callable[..., dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    return {
        world: alike_on_ranks(
            run_every_form,
            ranks=world,
            folder=tmp_path_factory.mktemp(f"world_{world}"),
            points=points_to_resume("form", world=world),
        )
        for world in (1, 2)
    }


@pytest.mark.parametrize(("world", "form", "resumed"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    runs: dict[int, dict[str, Any]], world: int, form: str, resumed: str
) -> None:
    whole, again = runs[world][form]["whole"], runs[world][form][resumed]
    assert len(set(series(whole, "loss/total"))) == LAST, "otherwise the comparison shows nothing"
    assert again["resumed_from"] == [f"update_{RESUMES[resumed]:06d}"]
    assert again["rows"] == whole["rows"]
    assert again["sha256"] == whole["sha256"]


@pytest.mark.parametrize("form", RESUMED)
def test_two_ranks_train_on_what_one_trains_on(runs: dict[int, dict[str, Any]], form: str) -> None:
    one, two = (series(runs[world][form]["whole"], "loss/total") for world in (1, 2))
    if (
        form == "distributed_sampler"
    ):  # its order depends on the number of ranks, and each sees all clips once
        assert len(one) == len(two)
        return
    assert two == pytest.approx(one, rel=RELATIVE_TOLERANCE, abs=0)


def test_a_loader_with_a_state_is_not_read_from_the_beginning(tmp_path: Path) -> None:
    loaders = [Stateful(_floats()), Stateful(_floats())]
    with dist.process_group(), without_plots():
        records = train_and_resume(
            lambda folder: _train(lambda: {"dataset": loaders[folder.name != "whole"]}, folder),
            tmp_path / "whole",
            {"middle": 6},
        )
    assert records["middle"]["sha256"] == records["whole"]["sha256"]
    assert loaders[1].iterated_from[0] > 0


def test_other_ranks_go_on_with_what_all_read(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    two = alike_on_ranks(train_plain, ranks=2, folder=folder)
    with dist.process_group(), without_plots():
        whole = _train(lambda: {"dataset": Listed(_bytes())}, tmp_path / "one")
        _forget_after(6, folder)
        again = _train(lambda: {"dataset": Listed(_bytes())}, folder)
    assert again["resumed_from"] == ["update_000006"]
    assert series(again, "loss/total")[-2:] == pytest.approx(series(whole, "loss/total")[-2:], rel=1e-4)
    assert series(two, "loss/total") == pytest.approx(series(whole, "loss/total"), rel=1e-5)


def test_an_order_that_changes_is_found_at_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with dist.process_group(), without_plots():
        _train(lambda: {"dataset": Listed(_bytes())}, folder)
        _forget_after(6, folder)
        other = copy.deepcopy(_bytes())[::-1]
        with pytest.raises(DataError, match="must give the items that it gave before the checkpoint"):
            _train(lambda: {"dataset": Listed(other)}, folder)
        with pytest.raises(CheckpointError, match="must be the iterable that it was"):
            _train(lambda: {"dataset": other}, folder, accept_changed_data=True)
        anew = _train(lambda: {"dataset": ClipIterable(Listed(other), on_resume="anew")}, folder)
    assert anew["updates"] == [EDGE, LAST - EDGE]


@pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")  # torchdata 0.11, torch 2.14
def test_torchdata_resumes_where_it_was(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(_floats(), batch_size=3, shuffle=True)

    with dist.process_group(), without_plots():
        records = train_and_resume(
            lambda folder: _train(lambda: {"dataset": loader()}, folder), tmp_path / "whole", RESUMES
        )
    assert len({record["sha256"] for record in records.values()}) == 1


def test_epochs_end_when_the_iterable_ends(tmp_path: Path) -> None:
    phase = {**LOW, "updates": None, "epochs": 2, "schedule": "constant", "global_batch_size": 4}
    with dist.process_group(), without_plots():
        record = _train(lambda: {"dataset": Listed(_bytes())}, tmp_path / "run", phases=[phase])
    assert record["updates"] == [5], "20 items in batches of 4"


# Below runs on the ranks.

LOW = {
    "name": "low",
    "resolution": "16x16",
    "duration": {"frames": 5},
    "global_batch_size": 4,
    "updates": EDGE,
    "learning_rate": 3e-3,
    "warmup_updates": 1,
}
HIGH = {**LOW, "name": "high", "resolution": "24x24", "duration": {"frames": 9}, "updates": LAST - EDGE}
WIDE = [
    {"resolution": "16x24", "duration": {"frames": 9}, "global_batch_size": 2},
    {"resolution": "24x24", "duration": {"frames": 5}, "global_batch_size": 4, "accumulation": 2},
]
SHARED = [{**bucket, "share": 0.5} for bucket in WIDE]


def run_every_form(folder: str, points: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns by form the uninterrupted run and its copies resumed at `points`."""
    found = {}
    for form, make in RESUMED.items():
        train = partial(_train_form, form, make)
        whole = Path(folder) / f"{form}_{dist.world_size()}"
        found[form] = train_and_resume(
            train, whole, {point: RESUMES[point] for point in points.get(form, ())}
        )
    return found


def train_plain(folder: str) -> dict[str, Any]:
    """Trains on an iterable that every rank reads."""
    with without_plots():
        return _train(lambda: {"dataset": Listed(_bytes())}, Path(folder))


def _train_form(form: str, make: Callable[[], Any], folder: Path) -> dict[str, Any]:
    phases = None
    if form == "mixed_lengths":
        without = {"resolution": None, "duration": None, "global_batch_size": None}
        phases = [{**LOW, **without, "buckets": WIDE}, {**HIGH, **without, "buckets": SHARED}]
    return _train(lambda: {"dataset": make()}, folder, phases=phases)


def _train(
    make: Callable[[], dict[str, Any]],
    folder: Path,
    *,
    phases: list[dict[str, Any]] | None = None,
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": "unused", "num_workers": 0},
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3, "haar_weight": 0.1},
            "curriculum": {"phases": phases or [LOW, HIGH]},
            "engine": {"kind": "deepspeed", "deepspeed_config": {"zero_optimization": {"stage": 1}}}
            if dist.world_size() > 1
            else {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "checkpoint": {"every_updates": 3},
            "evaluation": {"max_clips": 2, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
    torch.manual_seed(0)
    model = TinyVideoVAE()
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in the global streams
    np.random.seed(len(folder.name))
    random.seed(len(folder.name))
    held_out = [clip.flip(0) for clip in _bytes()[:2]]  # bytes: no declared range counts for them
    trainer = VideoVAETrainer(config, model=model, validation=held_out, **make())
    summary = trainer.train(accept_changed_data=accept_changed_data)
    return {**record_of(summary, folder), "replacements": list(summary.replacements)}


def _forget_after(update: int, folder: Path) -> None:
    """Leaves a finished run as if it had been stopped."""
    import shutil

    for checkpoint in (folder / "checkpoints").glob("update_*"):
        if int(checkpoint.name.removeprefix("update_")) > update:
            shutil.rmtree(checkpoint)
