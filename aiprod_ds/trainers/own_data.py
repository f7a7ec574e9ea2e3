"""Opens a user's own data: map-style datasets, loaders and iterables, of pictures, of sound and of latents.

Owns which object is read how, what is held out, and the data of a run whose clips come from an iterable.
What items may be is `aiprod_ds.data.own`'s. Called by `open_data.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from aiprod_ds.clock import Clock
from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.curriculum.data_rules import ClipFacts, TooShort
from aiprod_ds.curriculum.phase import PhasePlan, RunPlan
from aiprod_ds.data.dataset import ItemDataset, ItemReader
from aiprod_ds.data.loader import Draw, no_draws
from aiprod_ds.data.own.iterables import ItemPasses, Source, shuffled_dataset, source_of
from aiprod_ds.data.own.stream_loader import StreamLoader, StreamPlace
from aiprod_ds.engine import dist
from aiprod_ds.errors import DataError, PlanError
from aiprod_ds.report.summary import DataSummary
from aiprod_ds.rng import stream_seed
from aiprod_ds.trainers.clip_data import ClipData, require_clips

_LOG = logging.getLogger(__name__)
_Data = TypeVar("_Data", bound=ClipData)
_HOLDOUT_FRACTION = ClipDataConfig.model_fields["holdout_fraction"].default


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What is held out where a program does not say.

    Attributes:
        fraction: Of a map-style dataset without a validation set.
        max_clips: The most that are read of an iterable validation set.
    """

    fraction: float = _HOLDOUT_FRACTION
    max_clips: int = 16


def open_own_data(
    dataset: Any, validation: Any, reader: ItemReader, *, seed: int, held_out: HeldOut, kind: type[_Data]
) -> _Data | StreamData:
    """Returns the clips of a user's own data.

    Args:
        dataset: Map-style, a DataLoader, or an iterable; see `source_of`.
        validation: In the same forms; None holds out `held_out.fraction` of a map-style dataset.
        reader: Of its items.
        seed: Of the run.
        held_out: See there.
        kind: What to return for a map-style dataset.

    Raises:
        DataError: If it is of no known form, is empty, an item has another form, the first values cannot be
            right, or an iterable comes without validation set.
    """
    items, notes = _without_shuffling(dataset)
    source = source_of(items)
    if source is not None:
        if validation is None:
            raise DataError(
                "validation: must be given beside an iterable dataset, whose length and order nobody knows, "
                "got None. Pass a few clips that are not in it, as a list."
            )
        measured = _validation_items(validation, reader, seed=seed, held_out=held_out)
        for words in source.words():
            _LOG.info("own_data %s", words)
        return StreamData(
            train=ItemDataset([], reader),
            validation=measured,
            train_clips=(),
            validation_clips=tuple(measured.lengths()),
            notes=(*source.words(), *measured.notes()),
            source=source,
            reader=reader,
        )
    train = ItemDataset(items, reader)
    if validation is None:
        rest, measured = _split(train, held_out.fraction, seed=seed)
        chosen = f"dataset: {len(measured)} of {len(items)} items are held out, chosen by the seed"
        return kind.of(rest, measured, notes=(*notes, *train.notes(), chosen))
    measured = _validation_items(validation, reader, seed=seed, held_out=held_out)
    require_clips(items, measured)
    return kind.of(train, measured, notes=(*notes, *train.notes(), *measured.notes()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamData(ClipData):
    """Clips that come from an iterable: how many there are and how long they are shows while they are read.

    Attributes:
        source: What is iterated over.
        reader: Of its items.
    """

    source: Source
    reader: ItemReader

    def check(self, plan: RunPlan, source: str) -> tuple[TooShort, ...]:
        """Returns nothing: training clips are looked at when they come.

        Raises:
            PlanError: If held-out clips are too short for the last phase, or ranks with items of their own
                cannot agree on the order of buckets.
        """
        for phase in plan.phases:
            has_shares = len(phase.buckets) == 1 or phase.buckets[0].share is not None
            if self.source.is_sharded and plan.world_size > 1 and not has_shares:
                raise PlanError(
                    f"{source}: curriculum.phases[{phase.index}].buckets: must have shares where each rank "
                    "has items of its own, got none. Give every bucket a share."
                )
        self.require_held_out(plan, source)
        return ()

    def with_lengths(self, plan: RunPlan, source: str) -> RunPlan:
        """Returns `plan` as it is: phases that end by epochs end when the iterable has.

        Raises:
            PlanError: If a learning rate is to decay towards an end that nobody knows.
        """
        for phase in plan.phases:
            rate = phase.learning_rate
            if phase.end.epochs is not None and rate.updates is None and rate.kind != "constant":
                raise PlanError(
                    f"{source}: curriculum.phases[{phase.index}].schedule: must be constant where only "
                    f"epochs of an iterable end the phase, whose length nobody knows, got {rate.kind}. Set "
                    "it, or max_updates."
                )
        return plan

    def clip_counts(self, plan: RunPlan) -> list[list[int]]:
        """Returns zeros: nobody knows which clips will come."""
        return [[0] * len(phase.buckets) for phase in plan.phases]

    def replacements(self, plan: RunPlan) -> tuple[str, ...]:
        """Returns how the iterable is read, and that its batches are cut anew, in words."""
        sizes = sorted({bucket.micro_batch_size for phase in plan.phases for bucket in phase.buckets})
        if self.source.batch_size is None or sizes == [self.source.batch_size]:
            return self.notes
        own, wanted = self.source.batch_size, ", ".join(map(str, sizes))
        note = f"dataset: batches of {own} are cut and stacked anew, in order, to micro-batches of {wanted}"
        return (*self.notes, note)

    def summary(self, too_short: Sequence[TooShort]) -> DataSummary:
        """Returns what the report says about the data: nobody has counted the clips."""
        return replace(ClipData.summary(self, too_short), clips=None)

    def stream(
        self,
        phase: PhasePlan,
        clock: Clock,
        *,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int,  # noqa: ARG002  an iterable is read where it is; a DataLoader has its own
        draw: Draw = no_draws,
    ) -> StreamLoader:
        """Returns the micro-batches of `phase` for one rank; `restore` brings it to a clock inside it."""
        place = StreamPlace(
            phase=phase, seed=seed, rank=rank, world_size=world_size, start_position=clock.phase_position
        )
        must_agree = self.source.is_sharded and world_size > 1 and phase.end.epochs is not None
        return StreamLoader(
            self.source, self.reader, place, draw=draw, agree=dist.all_agree if must_agree else None
        )


def _without_shuffling(dataset: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the dataset of a loader that only shuffles it, which the run's own sampler does better."""
    inner = shuffled_dataset(dataset)
    if inner is None:
        return dataset, ()
    note = (
        "dataset: a DataLoader that shuffles is read by the run's own sampler, in micro-batches of the plan "
        "and with data.num_workers"
    )
    return inner, (note,)


def _validation_items(validation: Any, reader: ItemReader, *, seed: int, held_out: HeldOut) -> ItemDataset:
    items, _ = _without_shuffling(validation)
    source = source_of(items)
    if source is not None:
        if source.is_sharded and dist.world_size() > 1:
            raise DataError(
                "validation: must hold the same clips on all ranks, got a loader that gives each its own. "
                "Leave its DistributedSampler out."
            )
        items = list(_first(source, reader, seed=seed, count=held_out.max_clips))
    return ItemDataset(items, reader, is_held_out=True)


def _first(source: Source, reader: ItemReader, *, seed: int, count: int) -> Iterator[Any]:
    passes = ItemPasses(source, reader.kind, names=(seed, -1), rank=0)
    passes.settle()
    while passes.epoch == 0 and passes.number < count:
        yield passes.take().item
        if passes.number < count:
            passes.settle()
    passes.close()


def _split(dataset: ItemDataset, fraction: float, *, seed: int) -> tuple[ItemDataset, ItemDataset]:
    """Returns what to train on and what is held out: `round(fraction * clips)`, at least one and never all.

    Of videos and images only videos are held out, as `manifest.holdout` says why.
    """
    clips = dataset.lengths()
    candidates = _videos_or_all(clips)
    if len(candidates) < 2:
        raise DataError(
            f"dataset: must hold at least 2 clips to hold some out, got {len(clips)}. Add clips or pass "
            "validation."
        )
    wanted = min(max(1, round(fraction * len(candidates))), len(candidates) - 1)
    order = sorted(candidates, key=lambda place: (stream_seed(seed, "holdout", place), place))
    held = set(order[:wanted])
    rest = [place for place in range(len(clips)) if place not in held]
    return dataset.part(rest), dataset.part(sorted(held))


def _videos_or_all(clips: Sequence[ClipFacts]) -> list[int]:
    videos = [place for place, clip in enumerate(clips) if clip.frames > 1]
    return videos if len(videos) > 1 else list(range(len(clips)))
