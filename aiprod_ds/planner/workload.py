"""What one micro-batch takes on one GPU, in numbers that hold for any machine: the input of every estimate of
memory and time.

Pure records. `aiprod_ds.models.tracing` fills them by running forward and backward on shapes; `memory` and
`roofline` read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkKind(Enum):
    """What bounds a kernel, beside the bytes that it moves."""

    MATMUL = "matmul"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Kernels of one kind and size.

    Attributes:
        flops: Of one kernel, 2 for a multiply-add.
        moved_bytes: What one kernel reads and writes, each tensor once.
        element_bytes: Of the widest input: 4 means that tensor cores for 16 bit are not used.
        count: How many there are in a micro-batch, those of recomputation among them.
    """

    kind: WorkKind
    flops: float
    moved_bytes: float
    element_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One micro-batch of one shape on one rank, forward and backward, before any sharding.

    Attributes:
        parameters: Elements of the engine's module, frozen ones among them.
        trained: Those of them that the optimizer changes.
        trained_tensors: How many tensors these are.
        largest_trained: Elements of the largest of these.
        saved_bytes: What autograd and the caller hold when forward has ended: the activations.
        curve: Pairs of (trained elements whose gradient is done, highest bytes held at once up to that
            gradient since the one before); gradients themselves are not in it. The first pair, with 0
            elements, is forward.
        dispatched: Operations that the host started, views among them.
        flat_tensors: How many tensors the trained ones are where those of a block stand in flat parameters.
        block_saved_bytes: Of `saved_bytes` what repeated blocks save, which are what is compiled.
        block_output_bytes: Of that, what the blocks hand on.
        block_share: Share of the bytes that forward moves outside of products, attention and convolutions,
            which the blocks move.
        block_dispatched: Share of the operations that the host starts in forward, which the blocks start.
    """

    parameters: int
    trained: int
    trained_tensors: int
    largest_trained: int
    buffer_bytes: int
    saved_bytes: int
    curve: tuple[tuple[int, int], ...]
    work: tuple[Work, ...]
    dispatched: int
    flat_tensors: int = 0
    block_saved_bytes: int = 0
    block_output_bytes: int = 0
    block_share: float = 0.0
    block_dispatched: float = 0.0

    @property
    def flops(self) -> float:
        """Of all kernels, recomputation among them."""
        return sum(work.flops * work.count for work in self.work)

    def peak_bytes(self, *, bytes_per_gradient: float, share: float = 1.0) -> float:
        """Returns the highest sum of activations and those gradients that are already there.

        Args:
            bytes_per_gradient: What a gradient takes for each of its elements once it is done.
            share: Of the activations, what is kept.
        """
        return max(share * held + bytes_per_gradient * done for done, held in self.curve)
