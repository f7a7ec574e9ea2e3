"""What the training loop asks of an engine: the thing that owns parameters, gradients and optimizer state.

Two implementations: `deepspeed_engine.DeepSpeedEngine` and `local_engine.LocalEngine` (plain PyTorch, one
process, the control for numerics). The loop knows only this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aiprod_ds.engine.captured import CapturedLoss
from aiprod_ds.errors import EngineError
from aiprod_ds.snapshot import ShardSlice, Snapshot, StateReader


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share optimizer settings.

    Attributes:
        names: As in `module.named_parameters()`.
        is_decayed: Whether the weight decay of the configuration, and later of the phase, applies; otherwise
            it is always 0.
    """

    names: tuple[str, ...]
    is_decayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one update did.

    Attributes:
        applied: False when the update was skipped for a non-finite gradient (fp16 overflow). Equal on all
            ranks.
        gradient_norm: Global L2 norm before clipping, unscaled; a float or a 0-dim device tensor (read it
            late); NaN or inf when the update was skipped.
        loss_scale: The scale that this update's backward used; 1.0 outside fp16.
    """

    applied: bool
    gradient_norm: float | Tensor
    loss_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """One trained parameter, gathered and in fp32 on the CPU, whatever the sharding.

    Attributes:
        name: Its name in `module.named_parameters()`.
        value: The fp32 master weight, in the parameter's shape.
        optimizer: `exp_avg` and `exp_avg_sq` in the same shape; empty before the first update.
        step: Optimizer updates counted for this parameter.
    """

    name: str
    value: Tensor
    optimizer: dict[str, Tensor]
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A tensor that every rank holds with the same bits between two updates.

    Attributes:
        kind: `weight`, `master`, `average` or `buffer`.
        tensor: Not copied.
        slices: Which parts of which parameters or buffers lie in it; what lies between is padding.
    """

    kind: str
    tensor: Tensor
    slices: tuple[ShardSlice, ...]


class Engine(Protocol):
    """Owns the module between construction and `close`. One per process at a time.

    Attributes:
        module: What is trained.
        device: Where forward and backward run.
        rank: Of this process.
        world_size: Number of processes.
        compute_dtype: Type of the weights in `module`; masters are fp32 in any case.
        has_partitioned_masters: Whether each rank owns other masters; otherwise every rank owns all of them.
    """

    module: nn.Module
    device: torch.device
    rank: int
    world_size: int
    compute_dtype: torch.dtype
    has_partitioned_masters: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `module` forward with whatever gathering the sharding needs. Floating-point inputs are cast by
        the caller."""

    def captured_loss(
        self, loss: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor]
    ) -> CapturedLoss:
        """Returns `loss` as CUDA graphs for tensors of one shape; on the CPU as what computes the same.

        Args:
            loss: Calls the engine; see `CapturedLoss`.
            tensors: An example.

        Raises:
            EngineError: If the engine moves weights while they are computed with.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of `loss` (0-dim fp32, the mean over this rank's micro-batch), divided by the
        accumulation."""

    def step(self) -> UpdateResult | None:
        """Ends a micro-batch; returns None inside an accumulation window and the result of the update at its
        end."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate that the next update uses, in every parameter group."""

    def set_weight_decay(self, weight_decay: float) -> None:
        """Sets the decay that the next update uses, in the groups that are decayed."""

    def set_clip_norm(self, clip_norm: float | None) -> None:
        """Sets the global L2 norm to which the gradients of the updates that follow are scaled down; None:
        they are not.

        It may be called between `backward` and the `step` that ends the window. Every rank must give the same
        value.

        Raises:
            EngineError: If it is not a positive finite number.
        """

    def scale_moments(self, factor: float) -> None:
        """Multiplies Adam's moments by `factor` in [0, 1]; 0 also sets its step count to 0, as in a new
        optimizer. Collective.

        Raises:
            EngineError: If `factor` is out of range.
        """

    def set_batch(self, *, micro_batch_size: int, accumulation: int) -> None:
        """Changes the batch for the updates that follow.

        Raises:
            EngineError: If called inside an accumulation window.
        """

    def train(self) -> None:
        """Puts the module in training mode."""

    def eval(self) -> None:
        """Puts the module in evaluation mode."""

    def master_shards(self) -> list[Tensor]:
        """Returns the fp32 masters that this rank owns, in the order and the shapes of the optimizer state,
        not copied.

        Number, order, shapes and devices stay the same for the life of the engine and are those of any engine
        of the same layout. Whoever writes into them, between updates and on all ranks alike, calls
        `refresh_weights` afterwards.
        """

    def slices(self) -> list[tuple[ShardSlice, ...]]:
        """Returns, for each of `master_shards`, which parts of which parameters lie in it; what lies between
        is padding."""

    def replicas(self) -> list[Replica]:
        """Returns what this rank holds of which every other rank holds the same: weights that are not
        partitioned, masters likewise, and buffers.

        They stay where they are for the life of the engine. Number, order and sizes are the same on all
        ranks.
        """

    def refresh_weights(self) -> None:
        """Casts the masters into the weights that `module` computes with, as an update does at its end.
        Collective."""

    def frozen_dtypes(self) -> dict[str, torch.dtype]:
        """Returns the types of the weights that are not trained, by name."""

    def parameter_states(self) -> Iterator[ParameterState]:
        """Yields every trained parameter in name order. Collective: all ranks iterate to the end; rank 0 gets
        the tensors, other ranks may get empty ones."""

    def module_state(self) -> dict[str, Tensor]:
        """Returns the whole model (trained in fp32, frozen and buffers as they are) on rank 0, an empty dict
        on the others. Collective."""

    def read_value(self, name: str) -> Tensor:
        """Returns one parameter, whole and in fp32, on every rank. Collective.

        Args:
            name: As in `module.named_parameters()`.

        Returns:
            The master of a trained parameter, the weight of a frozen one: a new tensor on `device`.

        Raises:
            EngineError: If there is no such parameter.
        """

    def write_values(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets parameters to whole tensors, taken one at a time; the optimizer's state stays as it is.
        Collective.

        The fp32 master of a trained parameter is set, and at the end all weights are cast from their masters;
        of a frozen parameter the weight is set, in its own type. Call it between updates.

        Args:
            values: Name and fp32 tensor, on the CPU or `device`; the same on every rank, in the same order.
                They may be made by collectives.

        Raises:
            EngineError: If there is no such parameter, or a shape differs; the parameters before it are set,
                their weights not.
        """

    def capture(self) -> Snapshot:
        """Returns what this rank writes into a checkpoint: masters, moments, frozen weights and buffers, not
        copied.

        Call it between updates, and write or copy the tensors before the next. No collective; all ranks
        together write everything once.
        """

    def restore(self, source: StateReader) -> None:
        """Takes over what any engine of this model and precision captured, whatever its ranks and ZeRO stage.
        Collective.

        Bit for bit: masters, moments, frozen weights, buffers, Adam's step counts and the loss scale.
        Learning rate, weight decay, clipping norm and the rules of the loss scale stay those of this engine.

        Raises:
            CheckpointError: If it is of another model or precision, or cannot be read.
        """

    def close(self) -> None:
        """Releases everything, so that the module may be given to a new engine. Idempotent."""


def require_clip_norm(clip_norm: float | None) -> None:
    """Checks a norm for `Engine.set_clip_norm`.

    Raises:
        EngineError: If it is not a positive finite number or None.
    """
    if clip_norm is not None and not (clip_norm > 0.0 and math.isfinite(clip_norm)):
        raise EngineError(
            f"set_clip_norm: must be positive and finite, got {clip_norm}. None turns clipping off."
        )


def group_names(groups: Sequence[ParameterGroup]) -> list[str]:
    """Returns every name of `groups`, in order."""
    return [name for group in groups for name in group.names]
