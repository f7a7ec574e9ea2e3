"""Training without the trainer: the loops that it is compared with, each as short as it can be.

    plain       fused AdamW on weights of the compute type, no masters, no clipping
    flat        weights, gradients, fp32 masters and moments each in one tensor; clipping and AdamW as one
                compiled pass
    captured    the same; forward, backward and update are one CUDA graph
    deepspeed   ZeRO as DeepSpeed runs it, one parameter after another, clipping, fp32 masters
    accelerate  `Accelerator.prepare` with mixed precision over fp32 weights, clipping

Owns the loops and nothing of what they train. All compile the repeated blocks for static shapes and take the
attention kernel that the trainer takes; the batch lies on the device and is the same in every update. Called
by `side_by_side.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gradient_check import CLIP_NORM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import Choices, Shape, Workload

from aiprod_ds.engine.recompute import repeated_blocks

BETAS = (0.9, 0.999)
_RATE, _DECAY, _EPSILON = 1e-5, 0.01, 1e-8
_WARM_UPS = 3  # before a capture, as torch asks for
_HOPPER = 9
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a loop trains.

    Attributes:
        module: Its blocks already compiled, if they are to be.
        loss: Of the batch, by what is called as the module is.
        backend: Of torch.compile, for a loop's own kernels.
    """

    module: nn.Module
    loss: Callable[[Callable[..., Any]], Tensor]
    choices: Choices
    device: torch.device
    backend: str

    def trained(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that have a gradient."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}


class BareLoop(Protocol):
    """A loop of one batch."""

    is_clipped: bool

    def update(self) -> None:
        """Issues forward, backward and update."""

    def moments(self) -> dict[str, Tensor]:
        """Returns Adam's first moments, of any shape, by name."""

    def close(self) -> None:
        """Releases what outlives the object."""


def new_job(workload: Workload, shape: Shape, device: torch.device, choices: Choices, *, backend: str) -> Job:
    """Returns the workload's module and batch on the device."""
    module = workload.module(str(device), choices).train()
    if choices.compiles is not False:
        for block in repeated_blocks(module):
            block.compile(dynamic=False, backend=backend)
    inputs = workload.inputs(shape, str(device), choices)
    loss = functools.partial(_loss_of, workload, inputs)
    return Job(module=module, loss=loss, choices=choices, device=device, backend=backend)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Returns the context in which attention takes the kernel that the trainer's `auto` takes."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER:
        return sdpa_kernel(_CUDNN_FIRST, set_priority=True)
    return nullcontext()


class PlainLoop:
    """A loop as a first program has it: fast, but weights of 16 bits forget small updates."""

    is_clipped = False

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trained = job.trained()
        self._optimizer = adamw(self._trained)

    def update(self) -> None:
        """See `BareLoop`."""
        self._job.loss(self._job.module).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """See `BareLoop`."""
        return _moments(self._optimizer, self._trained)

    def close(self) -> None:
        """See `BareLoop`."""


class FlatLoop:
    """Weights and gradients are views of one tensor each; an update is one norm and one compiled pass."""

    is_clipped = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trained = job.trained()
        values = list(self._trained.values())
        self._weights = torch.cat([value.detach().flatten() for value in values])
        self._gradients = torch.zeros_like(self._weights)
        self._masters = self._weights.to(torch.float32, copy=True)
        self._first, self._second = torch.zeros_like(self._masters), torch.zeros_like(self._masters)
        self._updates = torch.zeros((), device=job.device)
        for value, weight, gradient in zip(
            values, self._split(self._weights), self._split(self._gradients), strict=True
        ):
            value.data, value.grad = weight, gradient
        self._apply = torch.compile(_flat_adamw, dynamic=False, backend=job.backend)

    def update(self) -> None:
        """See `BareLoop`."""
        self._job.loss(self._job.module).backward()  # type: ignore[no-untyped-call]
        self._updates += 1
        norm = torch.linalg.vector_norm(self._gradients, dtype=torch.float32)
        self._apply(
            self._weights, self._gradients, self._masters, self._first, self._second, self._updates, norm
        )

    def moments(self) -> dict[str, Tensor]:
        """See `BareLoop`."""
        return dict(zip(self._trained, self._split(self._first), strict=True))

    def close(self) -> None:
        """Lets the parameters go, which hold views."""
        for value in self._trained.values():
            value.grad = None

    def _split(self, flat: Tensor) -> list[Tensor]:
        values = self._trained.values()
        pieces = torch.split(flat, [value.numel() for value in values])
        return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)]


class CapturedLoop(FlatLoop):
    """The same, replayed; the first update warms up, captures, puts weights and moments back, and replays."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._graph: torch.cuda.CUDAGraph | None = None

    def update(self) -> None:
        """See `BareLoop`."""
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def close(self) -> None:
        """Gives the graph's memory back."""
        super().close()
        if self._graph is not None:
            self._graph.reset()

    def _capture(self) -> torch.cuda.CUDAGraph:
        began = self._weights.cpu()  # on the host, so that the peak is that of training
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                super().update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().update()
        self._weights.copy_(began)
        self._masters.copy_(self._weights)
        for state in (self._first, self._second, self._updates):
            state.zero_()
        return graph


class DeepSpeedLoop:
    """DeepSpeed as its users call it; inside a process group."""

    is_clipped = True

    def __init__(self, job: Job) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.initialize asks for it
        self._job = job
        self._trained = job.trained()
        shipped = job.choices.settings()
        del shipped["activation_checkpointing"]  # the trainer's own key
        settings = {
            **shipped,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": CLIP_NORM,
            "steps_per_print": 10**9,
        }
        self._engine, *_ = deepspeed.initialize(
            model=job.module, optimizer=adamw(self._trained), config=settings
        )

    def update(self) -> None:
        """See `BareLoop`."""
        self._engine.backward(self._job.loss(self._engine))
        self._engine.step()

    def moments(self) -> dict[str, Tensor]:
        """See `BareLoop`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            name: safe_get_full_optimizer_state(value, "exp_avg") for name, value in self._trained.items()
        }

    def close(self) -> None:
        """See `BareLoop`."""
        self._engine.destroy()


class AccelerateLoop:
    """What diffusers' training scripts do, without their data and logging."""

    is_clipped = True

    def __init__(self, job: Job) -> None:
        from accelerate import Accelerator

        self._job = job
        precision = {"fp32": "no", "bf16": "bf16"}[job.choices.precision]
        self._accelerator = Accelerator(mixed_precision=precision, cpu=job.device.type == "cpu")
        module = job.module.float()  # weights stay those of the compute type, rounded
        self._trained = job.trained()
        self._module, self._optimizer = self._accelerator.prepare(module, adamw(self._trained))

    def update(self) -> None:
        """See `BareLoop`."""
        self._accelerator.backward(self._job.loss(self._module))
        self._accelerator.clip_grad_norm_(self._module.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def moments(self) -> dict[str, Tensor]:
        """See `BareLoop`."""
        return _moments(self._optimizer.optimizer, self._trained)

    def close(self) -> None:
        """Forgets the module, which the accelerator keeps."""
        self._accelerator.free_memory()


LOOPS: dict[str, Callable[[Job], BareLoop]] = {
    "plain": PlainLoop,
    "flat": FlatLoop,
    "captured": CapturedLoop,
    "deepspeed": DeepSpeedLoop,
    "accelerate": AccelerateLoop,
}


def _loss_of(workload: Workload, inputs: dict[str, Any], run: Callable[..., Any]) -> Tensor:
    return workload.loss(run, inputs)


def adamw(trained: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """Returns torch's fused AdamW with the rate, betas and decay of all loops."""
    return torch.optim.AdamW(
        trained.values(), lr=_RATE, betas=BETAS, eps=_EPSILON, weight_decay=_DECAY, fused=True
    )


def _moments(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: optimizer.state[value]["exp_avg"] for name, value in trained.items() if value in optimizer.state
    }


def _flat_adamw(
    weights: Tensor,
    gradients: Tensor,
    masters: Tensor,
    first: Tensor,
    second: Tensor,
    updates: Tensor,
    norm: Tensor,
) -> None:
    """Clips, updates masters and moments, casts and clears the gradients, all in place."""
    gradient = gradients.float() * torch.clamp(CLIP_NORM / (norm + 1e-6), max=1.0)
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = (second / (1 - BETAS[1] ** updates)).sqrt() + _EPSILON
    masters.mul_(1 - _RATE * _DECAY).sub_(_RATE * (first / (1 - BETAS[0] ** updates)) / denominator)
    weights.copy_(masters)
    gradients.zero_()
