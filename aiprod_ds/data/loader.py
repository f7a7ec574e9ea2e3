"""Micro-batches of one rank, decoded ahead by worker processes, from any position on.

Owns the worker processes and how their failures surface. The sampler decides what comes when and the dataset
how a clip is read, so the number of workers changes neither the order nor a single value. The training loop
calls it.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.data.dataset import ClipRequest, ClipSample, ClipSource
from aiprod_ds.data.sampler import PhaseSampler, SampleRef, rank_slice
from aiprod_ds.errors import DataError

PREFETCHED_PER_WORKER = 2

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
        samples: Where each of the B clips comes from, in the order of the tensors.
        bucket: Which of the phase's buckets all of them belong to.
        position: The update of the phase to which the micro-step belongs.
    """

    tensors: Mapping[str, Tensor]
    samples: Sequence[SampleRef]
    bucket: int
    position: int

    def pin_memory(self) -> MicroBatch:
        """Returns the batch in page-locked memory; `DataLoader` looks for a method of this name."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})


class ClipLoader:
    """Infinite iterator over the micro-batches of one rank.

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

    Raises:
        DataError: When iterating, if a clip cannot be read or has another shape than its bucket; when
            starting or iterating, if a worker dies.
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
    ) -> None:
        buckets = tuple(buckets)
        loader: DataLoader[MicroBatch | _Failure] = DataLoader(
            _Clips(dataset, buckets, augment=augment, flip=flip, draw=partial(_placed, draw, sampler.phase)),
            batch_size=None,  # the sampler names whole micro-batches, which `_Clips` stacks
            sampler=_MicroBatches(
                sampler, buckets, rank=rank, world_size=world_size, start_position=start_position
            ),
            num_workers=num_workers,  # batches come in the sampler's order, whoever is ready first
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),  # or the copy to the GPU would make the host wait
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCHED_PER_WORKER if num_workers else None,
        )
        self._batches: Iterator[MicroBatch | _Failure] | None = None
        failure: _Failure | None = None
        try:
            # The only iterator: another one would have workers of its own and begin at the start position.
            self._batches = iter(loader)
        except RuntimeError as error:
            # The workers start here, and the signal of one that dies at once interrupts whatever runs then.
            failure = _lost_worker(error)
        if failure is not None:
            raise DataError(failure.message)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        assert self._batches is not None, "the loader is closed"
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            batch = _lost_worker(error)
        if isinstance(batch, _Failure):
            # Raised outside of the handler: an exception that holds the iterator's frames would keep the
            # other workers alive.
            self.close()
            raise DataError(batch.message)
        return batch

    def close(self) -> None:
        """Ends the worker processes; may be called at any time and more than once."""
        # DataLoader's iterator ends its workers when it is collected and offers no public method for it.
        self._batches = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    """A micro-batch to be read."""

    samples: Sequence[SampleRef]
    bucket: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Travels instead of an exception, to which `DataLoader` would add the worker's traceback as message."""

    message: str


class _MicroBatches:
    """Describes the micro-batches of one rank in order; runs in the process that trains."""

    def __init__(
        self,
        sampler: PhaseSampler,
        buckets: Sequence[BucketPlan],
        *,
        rank: int,
        world_size: int,
        start_position: int,
    ) -> None:
        self._sampler = sampler
        self._buckets = buckets
        self._rank = rank
        self._world_size = world_size
        self._start_position = start_position

    def __iter__(self) -> Iterator[_Description]:
        position = self._start_position
        while True:
            batch = self._sampler.batch(position)
            size = self._buckets[batch.bucket].micro_batch_size
            for samples in rank_slice(
                batch, rank=self._rank, world_size=self._world_size, micro_batch_size=size
            ):
                yield _Description(samples=samples, bucket=batch.bucket, position=position)
            position += 1


class _Clips(Dataset["MicroBatch | _Failure"]):
    """Reads described micro-batches; runs in the workers."""

    def __init__(
        self,
        dataset: ClipSource,
        buckets: Sequence[BucketPlan],
        *,
        augment: bool,
        flip: bool,
        draw: Callable[[Mapping[str, Tensor], _Description], Mapping[str, Tensor]],
    ) -> None:
        self._dataset = dataset
        self._buckets = buckets
        self._augment = augment
        self._flip = flip
        self._draw = draw

    def __getitem__(self, description: _Description) -> MicroBatch | _Failure:
        bucket = self._buckets[description.bucket]
        try:
            items = [self._read(sample, bucket) for sample in description.samples]
            tensors = {name: torch.stack([item[name] for item in items]) for name in items[0]}
            tensors |= self._draw(tensors, description)
        except DataError as error:
            return _Failure(message=str(error))
        except Exception as error:  # noqa: BLE001  the training process raises it again
            return _Failure(message=f"data loader: {type(error).__name__}: {error}")
        return MicroBatch(
            tensors=tensors,
            samples=description.samples,
            bucket=description.bucket,
            position=description.position,
        )

    def _read(self, sample: SampleRef, bucket: BucketPlan) -> ClipSample:
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
        item = self._dataset[request]
        for name, tensor in item.items():
            expected = _expected_shape(name, tensor, bucket)
            if expected is not None and (tensor.shape != expected or tensor.dtype != torch.float32):
                raise DataError(
                    f"sample {sample.sample_index}: {name} must be float32 of shape {expected}, got "
                    f"{tensor.dtype} of "
                    f"{tuple(tensor.shape)}. Make the dataset return what the request asks for."
                )
        return item


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


def _lost_worker(error: RuntimeError) -> _Failure:
    return _Failure(
        message=f"data loader: worker processes must stay alive, got {error} "
        "Raise the machine's memory or shared memory, or lower the number of workers."
    )


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_worker: int) -> None:
    # What the parent has left as garbage may hold threads, as a frame that PyAV has converted does (18.1.0:
    # swscale's slices). A fork has none of them, and to free such a thing here would wait for them forever.
    gc.freeze()
    torch.set_num_threads(1)  # the workers are the threads, as many as cores are to be used
    # Ctrl-C reaches the whole process group; the training process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So do the signals that make it save, which needs the batches of the update under way; only its own
    # SIGTERM ends a worker. A handler in Python cannot tell who sent it, `sigwaitinfo` can.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def _obey_parent() -> None:
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
