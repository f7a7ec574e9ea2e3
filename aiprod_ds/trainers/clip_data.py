"""The clips of a run, of any kind: training and held-out sets, the stream of one phase, and what could not be
used.

Owns how manifests and a user's own datasets become requests; what a clip holds and how it is decoded is the
dataset's (`aiprod_ds.data`). `open_data.py` opens each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import Self

from aiprod_ds.clock import Clock
from aiprod_ds.config.data import ClipDataConfig
from aiprod_ds.curriculum.auto_buckets import auto_notes, with_auto_buckets
from aiprod_ds.curriculum.data_rules import ClipFacts, TooShort, check_data, data_notes
from aiprod_ds.curriculum.epochs import with_epoch_lengths
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.data.buckets import bucket_clips, long_enough
from aiprod_ds.data.clip_list import ClipList, Listing, list_facts, list_files
from aiprod_ds.data.dataset import ClipDataset, ClipRequest, ClipSample
from aiprod_ds.data.loader import ClipLoader, Draw, MicroBatch, no_draws
from aiprod_ds.data.manifest import Manifest, holdout, require_readable
from aiprod_ds.data.own.stream_loader import StreamLoader
from aiprod_ds.data.packed.media import open_source
from aiprod_ds.data.reading.read_all import unread_clips
from aiprod_ds.data.reading.replacing import UnreadClip, read_patiently
from aiprod_ds.data.sampler import BucketSamples, PhaseSampler
from aiprod_ds.data.treatment import duplicate_notes, ignored_notes, unreadable_notes
from aiprod_ds.errors import CheckpointError, DataError, PlanError
from aiprod_ds.report.summary import DataSummary
from aiprod_ds.shards.reader import ShardReader

_MAX_TRIED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipStream:
    """One phase's micro-batches; a `Stream`."""

    sampler: PhaseSampler
    loader: ClipLoader
    clips: tuple[ClipFacts, ...]

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches, without end."""
        return iter(self.loader)

    def bucket_at(self, position: int) -> int:
        """Returns which bucket of the phase the global batch at `position` is in."""
        return self.sampler.bucket_at(position)

    def epoch_at(self, position: int) -> int:
        """Returns the completed passes over the phase's data before `position`."""
        return self.sampler.epoch_at(position)

    def clips_at(self, position: int) -> Sequence[str]:
        """Returns the names of the clips of the global batch at `position`."""
        return [self.clips[sample.sample_index].name for sample in self.sampler.batch(position).samples]

    def leave_out(self, names: Collection[str]) -> None:
        """Replaces the clips of these names, without reading them, in all that is yielded from now on."""
        self.loader.leave_out([index for index, clip in enumerate(self.clips) if clip.name in names])

    def state_at(self, position: int) -> Mapping[str, Any]:  # noqa: ARG002  the clock says all
        """Returns nothing: which clips make which update is a function of the clock."""
        return {}

    def restore(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Checks that the run had no iterable.

        Raises:
            CheckpointError: If its place in one was saved.
        """
        if ranks:
            raise CheckpointError(
                "dataset: must be the iterable that it was when the checkpoint was saved, got clips in "
                "random access. Pass what the run had."
            )

    def close(self) -> None:
        """Ends the workers."""
        self.loader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipData:
    """Training and held-out clips with what is known of each.

    Attributes:
        unreadable: Files that were left out, and why.
        notes: What is done with files that a clip is not like, in words.
        listing: Of clips that are files: what their list is made of.
        failed: Held-out clips that could not be read in this process; grows.
    """

    train: ClipDataset
    validation: ClipDataset
    train_clips: tuple[ClipFacts, ...]
    validation_clips: tuple[ClipFacts, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    listing: Listing | None = None
    failed: set[int] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        train: ClipDataset,
        validation: ClipDataset,
        *,
        unreadable: tuple[tuple[str, str], ...] = (),
        notes: tuple[str, ...] = (),
        listing: Listing | None = None,
    ) -> Self:
        """Returns both sets with their lengths read."""
        clips, held_out = tuple(train.lengths()), tuple(validation.lengths())
        return cls(
            train=train,
            validation=validation,
            train_clips=clips,
            validation_clips=held_out,
            unreadable=unreadable,
            notes=notes,
            listing=listing,
        )

    def clip_list(
        self, *, selection: Mapping[str, Any], fingerprints: Mapping[str, str] | None = None
    ) -> ClipList:
        """Returns the clips in the order in which their indices count, for checkpoints.

        Args:
            selection: The settings that chose them.
            fingerprints: What a user's own datasets say of their content, by name.

        Raises:
            DataError: If a file of latents cannot be read.
        """
        if self.listing is not None:
            return list_files(self.listing, selection=selection)
        clips, held_out = self.train_clips, self.validation_clips
        return list_facts(clips, held_out, selection=selection, fingerprints=fingerprints)

    def with_buckets(self, plan: RunPlan, source: str) -> RunPlan:
        """Returns `plan` with the shapes that phases with `buckets: auto` get on these clips.

        Raises:
            PlanError: If no clip is known beforehand, as of an iterable.
        """
        asked = [phase.index for phase in plan.phases if phase.auto is not None]
        if asked and not self.train_clips:
            raise PlanError(
                f"{source}: curriculum.phases[{asked[0]}].buckets: auto needs clips that are known before "
                "training, got none. List the buckets."
            )
        return with_auto_buckets(plan, self.train_clips)

    def found_buckets(self, plan: RunPlan) -> tuple[str, ...]:
        """Returns in words what `with_buckets` found, one sentence a bucket."""
        return auto_notes(plan, self.train_clips, self._members(plan))

    def check(self, plan: RunPlan, source: str) -> tuple[TooShort, ...]:
        """Returns the training clips that some phase cannot use.

        Raises:
            PlanError: If a bucket has no clip, because all are too short or fit another one better, or
                held-out clips are too short for the last phase.
        """
        too_short = check_data(plan, self.train_clips, self._members(plan), source)
        self.require_held_out(plan, source)
        return too_short

    def require_held_out(self, plan: RunPlan, source: str) -> None:
        """Checks that a held-out clip is long enough to be measured.

        Raises:
            PlanError: If all are too short for the last phase.
        """
        bucket = plan.phases[-1].buckets[0]
        if not self.held_out(bucket):
            raise PlanError(
                f"{source}: data.validation: must hold a clip of at least {bucket.length_text} (the last "
                "phase's), got none. "
                "Add longer clips or shorten the last phase's."
            )

    def with_lengths(self, plan: RunPlan, source: str) -> RunPlan:
        """Returns `plan` with the lengths that its epochs have on these clips; call `check` first.

        Raises:
            PlanError: If the epochs of a phase are over before its warm-up is.
        """
        epoch_updates = {
            phase.index: self._sampler(phase, seed=0).updates_in(
                phase.end.epochs
            )  # no length depends on the seed
            for phase in plan.phases
            if phase.end.epochs is not None
        }
        return with_epoch_lengths(plan, epoch_updates, source)

    def clip_counts(self, plan: RunPlan) -> list[list[int]]:
        """Returns how many clips each bucket of each phase draws from."""
        return [[len(indices) for indices in members] for members in self._members(plan)]

    def replacements(self, plan: RunPlan) -> tuple[str, ...]:
        """Returns in words what is done with files that a clip is not like, and with clips that are smaller,
        slower, shorter or fewer than a bucket asks for."""
        notes = data_notes(plan, self.train_clips, self._members(plan))
        return (*self.notes, *self.found_buckets(plan), *notes)

    def stream(
        self,
        phase: PhasePlan,
        clock: Clock,
        *,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int,
        draw: Draw = no_draws,
    ) -> ClipStream | StreamLoader:
        """Returns the micro-batches of `phase` from the clock's position on, for one rank."""
        sampler = self._sampler(phase, seed)
        loader = ClipLoader(
            self.train,
            sampler,
            phase.buckets,
            rank=rank,
            world_size=world_size,
            start_position=clock.phase_position,
            num_workers=num_workers,
            augment=True,
            flip=phase.random_flip,
            draw=draw,
            name_of=self._train_name,
        )
        return ClipStream(sampler=sampler, loader=loader, clips=self.train_clips)

    def _train_name(self, index: int) -> str:
        return self.train_clips[index].name

    def held_out(self, bucket: BucketPlan) -> tuple[int, ...]:
        """Returns the indices of the held-out clips that are long enough for `bucket`."""
        return long_enough(self.validation_clips, bucket)

    def held_out_clip(self, index: int, bucket: BucketPlan) -> ClipSample:
        """Returns the middle of one held-out clip in the bucket's shape."""
        return self.validation[middle_of_clip(index, bucket)]

    def try_held_out(self, index: int, bucket: BucketPlan) -> ClipSample | UnreadClip:
        """Returns what `held_out_clip` does, or why the clip cannot be read.

        It is tried again with growing waits; the next time once.
        """
        waits = () if index in self.failed else None
        found = read_patiently(self.validation, middle_of_clip(index, bucket), waits=waits)
        if not isinstance(found, str):
            return found
        self.failed.add(index)
        return UnreadClip(sample_index=index, name=self.validation_clips[index].name, reason=found)

    def readable_clip(self, bucket: BucketPlan) -> ClipSample:
        """Returns the first held-out clip in the bucket's shape that can be read, or else a training clip.

        Raises:
            DataError: If there is none.
        """
        reasons = []
        for index in self.held_out(bucket)[:_MAX_TRIED]:
            found = self.try_held_out(index, bucket)
            if not isinstance(found, UnreadClip):
                return found
            reasons.append(found.reason)
        for index in long_enough(self.train_clips, bucket)[:_MAX_TRIED]:
            other = read_patiently(self.train, middle_of_clip(index, bucket), waits=())
            if not isinstance(other, str):
                return other
            reasons.append(other)
        raise DataError(
            f"data: a clip must be readable, got {len(reasons)} that could not be read, first: {reasons[0]}"
        )

    def unread_for_training(
        self, plan: RunPlan, names: Collection[str] | None = None
    ) -> tuple[UnreadClip, ...]:
        """Returns the training clips that cannot be read to their end.

        Args:
            plan: Says in which shapes a clip is read that has several.
            names: Of the clips that are tried; all by default.
        """
        shapes = [
            (bucket, frozenset(indices))
            for phase, members in zip(plan.phases, self._members(plan), strict=True)
            for bucket, indices in zip(phase.buckets, members, strict=True)
        ]
        return unread_clips(
            self.train,
            [index for index, clip in enumerate(self.train_clips) if names is None or clip.name in names],
            name_of=self._train_name,
            requests=lambda index: [
                middle_of_clip(index, bucket) for bucket, indices in shapes if index in indices
            ],
            title="reading training clip",
        )

    def unread_held_out(self, plan: RunPlan) -> tuple[UnreadClip, ...]:
        """Returns the held-out clips that cannot be read to their end."""
        bucket = plan.phases[-1].buckets[0]
        measured = frozenset(self.held_out(bucket))
        return unread_clips(
            self.validation,
            range(len(self.validation_clips)),
            name_of=lambda index: self.validation_clips[index].name,
            requests=lambda index: [middle_of_clip(index, bucket)] if index in measured else [],
            title="reading held-out clip",
        )

    def summary(self, too_short: Sequence[TooShort]) -> DataSummary:
        """Returns what the report says about the data."""
        short = tuple(
            (name, f"under {entry.length}, unused in phase {entry.phase}")
            for entry in too_short
            for name in entry.names
        )
        return DataSummary(
            clips=len(self.train_clips),
            held_out_clips=len(self.validation_clips),
            unreadable=self.unreadable,
            too_short=short,
        )

    def _members(self, plan: RunPlan) -> list[tuple[tuple[int, ...], ...]]:
        return [bucket_clips(self.train_clips, phase.buckets) for phase in plan.phases]

    def _sampler(self, phase: PhasePlan, seed: int) -> PhaseSampler:
        buckets = [
            BucketSamples(indices=indices, global_batch_size=bucket.global_batch_size, share=bucket.share)
            for bucket, indices in zip(
                phase.buckets, bucket_clips(self.train_clips, phase.buckets), strict=True
            )
        ]
        return PhaseSampler(seed=seed, phase=phase.index, buckets=buckets)


def middle_of_clip(index: int, bucket: BucketPlan) -> ClipRequest:
    """Returns the request for the middle of a clip in the bucket's shape, without augmentation."""
    return ClipRequest(
        sample_index=index,
        epoch=0,
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        frame_rate_hz=bucket.frame_rate_hz,
        augment=False,
        flip=False,
    )


def split_manifests(
    config: ClipDataConfig, scan: Callable[[Path | ShardReader], Manifest], *, seed: int
) -> tuple[Manifest, Manifest]:
    """Returns what to train on and what is held out, from the folders or tables that `config` names.

    Args:
        config: The data section.
        scan: Reads one of them, or shards.
        seed: The run's seed.

    Raises:
        DataError: If one is missing or empty, or too many files cannot be read.
    """
    found = scan(open_source(config.train, config.storage))
    require_readable(found, config.max_unreadable_fraction)
    if config.validation is None:
        return holdout(found, fraction=config.holdout_fraction, seed=seed)
    validation = scan(open_source(config.validation, config.storage))
    require_readable(validation, config.max_unreadable_fraction)
    return found, validation


def manifest_notes(config: ClipDataConfig, train: Manifest, validation: Manifest) -> tuple[str, ...]:
    """Returns what the manifests leave out and what they hold twice, in words.

    Raises:
        DataError: If something stands twice and `data.duplicates` is `error`.
    """
    copies = () if config.duplicates == "allow" else duplicate_notes(train, validation)
    if copies and config.duplicates == "error":
        raise DataError(
            f"{train.where}: must hold no clip twice (data.duplicates: error), got {'; '.join(copies)}. "
            "Remove the copies, or set data.duplicates to warn or allow."
        )
    return (*unreadable_notes(train, validation), *ignored_notes(train, validation), *copies)


def unreadable_files(*manifests: Manifest) -> tuple[tuple[str, str], ...]:
    """Returns (path, reason) of every file that the manifests leave out."""
    return tuple((entry.path, entry.reason) for manifest in manifests for entry in manifest.unreadable)


def require_clips(dataset: Any, validation: Any) -> None:
    """Checks a user's own datasets.

    Raises:
        DataError: If one is empty.
    """
    if len(dataset) == 0 or len(validation) == 0:
        raise DataError(
            f"dataset: must hold at least one clip each, got {len(dataset)} for training, {len(validation)} "
            "held out."
        )
