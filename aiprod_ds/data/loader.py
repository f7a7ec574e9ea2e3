"""Micro-batches of one rank, decoded ahead by worker processes, from any position on.

Owns what is asked of the workers and what of it was delivered: workers that die are started again where they
were, and a clip that is left out comes in no micro-batch that is delivered from then on. The sampler decides
what comes when, the dataset how a clip is read and `reading/` what takes its place if it cannot be, so the
number of workers changes neither the order nor a single value. The training loop calls it.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.dataset import ClipRequest, ClipSource
from aiprod_ds.data.reading.replacing import ReadClip, ReplacingReader, UnreadClip
from aiprod_ds.data.reading.workers import Restarts, Workers, start_worker
from aiprod_ds.data.sampler import PhaseSampler, SampleRef, rank_slice
from aiprod_ds.errors import DataError

PREFETCHED_PER_WORKER = 2
_LOG = logging.getLogger(__name__)

Draw = Callable[[Mapping[str, Tensor], Sequence[tuple[int, ...]]], Mapping[str, Tensor]]
"""Given the tensors of a micro-batch and the place of each of its clips in the global order (phase, position,
ordinal), returns what chance adds to them."""


def no_draws(_tensors: Mapping[str, Tensor], _places: Sequence[tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Returns nothing."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """What one rank trains on in one micro-step.

    Attributes:
        tensors: The items of the dataset, stacked name by name: `video` [B,3,T,H,W] or `audio` [B,C,N],
            float32 in [-1,1], or latents and embeddings in the types of their files.
        samples: Where each of the B clips comes from, in the order of the tensors; of one in another's place,
            its own index with the other's epoch and ordinal.
        bucket: Which of the phase's buckets all of them belong to.
        position: The update of the phase to which the micro-step belongs.
        unread: Clips that could not be read for it and were replaced.
        restarts: How often workers had died and were started again before it came.
    """

    tensors: Mapping[str, Tensor]
    samples: Sequence[SampleRef]
    bucket: int
    position: int
    unread: tuple[UnreadClip, ...] = ()
    restarts: int = 0

    def pin_memory(self) -> MicroBatch:
        """Returns the batch in page-locked memory; `DataLoader` looks for a method of this name."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})


class ClipLoader:
    """Infinite iterator over the micro-batches of one rank; the workers start with the first of them.

    Args:
        dataset: Reads clips; must be picklable where worker processes are not forked.
        sampler: Names the samples; made for the same phase as `buckets`.
        buckets: Shape and micro-batch of each of the sampler's buckets, in its order.
        rank: 0 <= rank < world_size.
        world_size: Ranks that share every global batch, which is a multiple of world_size * micro_batch_size.
        start_position: The first update to deliver; its first micro-batch comes first.
        num_workers: Processes that decode ahead; 0 decodes in this one.
        augment: Whether clips are drawn at a random place instead of the centre.
        flip: Whether clips are mirrored at random.
        draw: Adds what chance decides, in the workers: it is there and pinned when an update wants it.
        name_of: How a clip is called, by its index.

    Raises:
        DataError: When iterating, if a clip has another shape than its bucket, if neither a clip nor another
            one in its place can be read, or if workers die again and again.
    """

    def __init__(  # noqa: PLR0913  each argument is one independent fact of the run
        self,
        dataset: ClipSource,
        sampler: PhaseSampler,
        buckets: Sequence[BucketPlan],
        *,
        rank: int,
        world_size: int,
        start_position: int,
        num_workers: int,
        augment: bool,
        flip: bool,
        draw: Draw = no_draws,
        name_of: Callable[[int], str] = "sample {}".format,
    ) -> None:
        buckets = tuple(buckets)
        self._clips = _Clips(
            ReplacingReader(dataset, name_of),
            sampler,
            buckets,
            augment=augment,
            flip=flip,
            draw=partial(_placed, draw, sampler.phase),
        )
        self._order = _Order(
            _micro_batches(sampler, buckets, rank=rank, world_size=world_size, start_position=start_position)
        )
        self._num_workers = num_workers
        self._workers, self._restarts = Workers(), Restarts()
        # The only iterator at a time: another one would have workers of its own.
        self._batches: Iterator[MicroBatch | _Failure] | None = None
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        assert not self._is_closed, "the loader is closed"
        batch = self._fetched()
        while isinstance(batch, _Lost):
            self._end_workers()
            if not self._restarts.may_begin():
                batch = batch.as_failure()
                break
            _LOG.warning(
                "loader_restarted restart=%d position=%d reason=%s",
                self._restarts.in_all, self._order.next.position, batch.reason,
            )  # fmt: skip
            batch = self._fetched()
        if isinstance(batch, MicroBatch) and self._holds_left_out(batch):
            # It was read ahead, before the clip was left out: a resumed run never reads that.
            batch = self._read_here()
        if isinstance(batch, _Failure):
            # Raised outside of the handler: an exception that holds the iterator's frames would keep the
            # other workers alive.
            self.close()
            raise DataError(batch.message)
        self._order.delivered()
        if batch.unread:
            self.leave_out([clip.sample_index for clip in batch.unread])
        if self._restarts.in_a_row:
            batch = replace(batch, restarts=self._restarts.in_a_row)
            self._restarts.in_a_row = 0
        return batch

    def leave_out(self, indices: Collection[int]) -> None:
        """Replaces these clips at once, without reading them, in every micro-batch delivered from now on."""
        self._order.left_out |= frozenset(indices)

    def close(self) -> None:
        """Ends the worker processes; may be called at any time and more than once."""
        self._end_workers()
        self._is_closed = True
        self._workers.end()

    def _end_workers(self) -> None:
        # DataLoader's iterator ends its workers when it is collected and offers no public method for it.
        self._batches = None
        if self._workers.are_there():
            # A death that was heard inside torch may have left a circle of frames that holds the iterator.
            gc.collect()

    def _fetched(self) -> MicroBatch | _Failure | _Lost:
        """Returns the next micro-batch, or how the workers were lost that were to read it."""
        if not self._num_workers:
            return next(self._started())
        try:
            batches, dead = self._started(), self._workers.dead()
            if dead is not None:
                return _Lost(reason=dead)
            with self._workers.heard():
                return next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            # torch's own, or of the connection to a worker that is gone.
            return _Lost(reason=self._workers.dead() or f"{type(error).__name__}: {error}")
        except StopIteration:
            raise
        except BaseException:
            # Whoever interrupts the wait has given the data up. A worker that blocks would outlast the
            # loader.
            self._workers.kill()
            raise

    def _started(self) -> Iterator[MicroBatch | _Failure]:
        if self._batches is None:
            self._batches = self._workers.start(lambda: iter(self._data_loader()))
        return self._batches

    def _data_loader(self) -> DataLoader[MicroBatch | _Failure]:
        return DataLoader(
            self._clips,
            batch_size=None,  # the sampler names whole micro-batches, which `_Clips` stacks
            sampler=self._order,
            num_workers=self._num_workers,  # batches come in the sampler's order, whoever is ready first
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),  # or the copy to the GPU would make the host wait
            worker_init_fn=start_worker,
            prefetch_factor=PREFETCHED_PER_WORKER if self._num_workers else None,
        )

    def _holds_left_out(self, batch: MicroBatch) -> bool:
        left_out = self._order.left_out
        return bool(left_out) and any(sample.sample_index in left_out for sample in batch.samples)

    def _read_here(self) -> MicroBatch | _Failure:
        batch = self._clips[self._order.next]
        return batch.pin_memory() if isinstance(batch, MicroBatch) and torch.cuda.is_available() else batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    """A micro-batch to be read, without the clips that are left out."""

    samples: Sequence[SampleRef]
    bucket: int
    position: int
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Travels instead of an exception, to which `DataLoader` would add the worker's traceback as message."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lost:
    """A worker has died."""

    reason: str

    def as_failure(self) -> _Failure:
        return _Failure(
            message=f"data loader: worker processes must stay alive, got {self.reason.strip()} again and "
            "again. Raise the machine's memory or shared memory, or lower the number of workers."
        )


class _Order:
    """What is asked of the workers in order, and which of it was not delivered; in the process that trains.

    Attributes:
        left_out: Clips that are not to be read.
    """

    def __init__(self, descriptions: Iterator[_Description]) -> None:
        self.left_out: frozenset[int] = frozenset()
        self._further = descriptions
        self._pending: deque[_Description] = deque()

    @property
    def next(self) -> _Description:
        """The first micro-batch that was not delivered, as it is to be read now."""
        if not self._pending:
            self._pending.append(next(self._further))
        return self._as_known(self._pending[0])

    def __iter__(self) -> Iterator[_Description]:
        """Yields what was not delivered and then what follows: workers that start anew begin there."""
        for description in tuple(self._pending):
            yield self._as_known(description)
        for description in self._further:
            self._pending.append(description)
            yield self._as_known(description)

    def delivered(self) -> None:
        """Takes the first away."""
        self._pending.popleft()

    def _as_known(self, description: _Description) -> _Description:
        return replace(description, left_out=self.left_out) if self.left_out else description


def _micro_batches(
    sampler: PhaseSampler,
    buckets: Sequence[BucketPlan],
    *,
    rank: int,
    world_size: int,
    start_position: int,
) -> Iterator[_Description]:
    """Yields the micro-batches of one rank in order."""
    position = start_position
    while True:
        batch = sampler.batch(position)
        size = buckets[batch.bucket].micro_batch_size
        for samples in rank_slice(batch, rank=rank, world_size=world_size, micro_batch_size=size):
            yield _Description(samples=samples, bucket=batch.bucket, position=position)
        position += 1


class _Clips(Dataset["MicroBatch | _Failure"]):
    """Reads described micro-batches; runs in the workers."""

    def __init__(
        self,
        reader: ReplacingReader,
        sampler: PhaseSampler,
        buckets: Sequence[BucketPlan],
        *,
        augment: bool,
        flip: bool,
        draw: Callable[[Mapping[str, Tensor], _Description], Mapping[str, Tensor]],
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._buckets = buckets
        self._augment = augment
        self._flip = flip
        self._draw = draw

    def __getitem__(self, description: _Description) -> MicroBatch | _Failure:
        try:
            asked = list(description.samples)
            clips = [self._read(sample, description) for sample in asked]
            first = clips[0].item
            tensors = {name: torch.stack([clip.item[name] for clip in clips]) for name in first}
            tensors |= self._draw(tensors, description)
        except DataError as error:
            return _Failure(message=str(error))
        except Exception as error:  # noqa: BLE001  the training process raises it again
            return _Failure(message=f"data loader: {type(error).__name__}: {error}")
        return MicroBatch(
            tensors=tensors,
            samples=description.samples if _are_as_asked(asked, clips) else _as_read(asked, clips),
            bucket=description.bucket,
            position=description.position,
            unread=tuple(unread for clip in clips for unread in clip.unread),
        )

    def _read(self, sample: SampleRef, description: _Description) -> ReadClip:
        bucket = self._buckets[description.bucket]
        request = ClipRequest(
            sample_index=sample.sample_index,
            epoch=sample.epoch,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            frame_rate_hz=bucket.frame_rate_hz,
            augment=self._augment,
            flip=self._flip,
        )
        candidates = partial(
            self._sampler.substitutes, description.position, description.bucket, sample.ordinal
        )
        clip = self._reader.read(request, candidates, description.left_out)
        for name, tensor in clip.item.items():
            expected = _expected_shape(name, tensor, bucket)
            if expected is not None and (tensor.shape != expected or tensor.dtype != torch.float32):
                raise DataError(
                    f"sample {clip.sample_index}: {name} must be float32 of shape {expected}, got "
                    f"{tensor.dtype} of "
                    f"{tuple(tensor.shape)}. Make the dataset return what the request asks for."
                )
        return clip


def _are_as_asked(asked: Sequence[SampleRef], clips: Sequence[ReadClip]) -> bool:
    return all(sample.sample_index == clip.sample_index for sample, clip in zip(asked, clips, strict=True))


def _as_read(asked: Sequence[SampleRef], clips: Sequence[ReadClip]) -> Sequence[SampleRef]:
    """Returns the samples with the indices of what was read in their place."""
    return [
        sample._replace(sample_index=clip.sample_index) for sample, clip in zip(asked, clips, strict=True)
    ]


def _placed(
    draw: Draw, phase: int, tensors: Mapping[str, Tensor], description: _Description
) -> Mapping[str, Tensor]:
    return draw(tensors, [(phase, description.position, sample.ordinal) for sample in description.samples])


def _expected_shape(name: str, tensor: Tensor, bucket: BucketPlan) -> tuple[int, ...] | None:
    """What a tensor of this name must have; the channels of sound are the dataset's own. None: any, as of
    latents."""
    if name == "video":
        return (3, bucket.frames, bucket.height, bucket.width)
    if name == "audio":
        return (*tensor.shape[:1], bucket.frames)
    return None


def _unchanged(item: Any) -> Any:
    return item
