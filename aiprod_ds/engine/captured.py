"""Forward and backward pass of a micro-batch as two CUDA graphs, which the host starts with two calls.

The passes are captured once for each shape and replayed with other values in the same memory. Owns the
capture and how gradients come to the parameters: through autograd, so that an engine's hooks on them see what
any other backward pass brings. On the CPU, where there are no graphs, the passes are computed anew each time,
by the same way. Whether a loss can be captured is for the caller to know: it may neither wait for the device
nor read what differs between micro-batches from anywhere but its tensors.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.errors import EngineError

_SHARE_OF_FREE = 0.5
_WAITED = "synchronizing CUDA operation"  # in the message of c10/cuda/CUDAFunctions.cpp


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureHooks:
    """What an engine does around captured passes.

    Attributes:
        direct: A context in which calling the engine calls its module with these parameters in place of its
            own, and with nothing around it.
        before_forward: Called before each forward pass.
        before_backward: Called in each backward pass, before gradients come to the parameters.
    """

    direct: Callable[[Mapping[str, nn.Parameter]], AbstractContextManager[None]]
    before_forward: Callable[[], None] = lambda: None
    before_backward: Callable[[], None] = lambda: None


class DirectCalls:
    """Calls a module with other parameters in place of its own, while it is told to.

    For the time in which passes are captured: what an engine does around the module would run its Python
    once, then, and never again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: dict[str, Tensor] | None = None

    @property
    def are_on(self) -> bool:
        """Whether an engine's calls are to come here."""
        return self._parameters is not None

    @contextmanager
    def using(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Sets the parameters for the body."""
        self._parameters = dict(parameters)
        try:
            yield
        finally:
            self._parameters = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module does with the parameters that are set."""
        assert self._parameters is not None, "calls come here only in `using`"
        return torch.func.functional_call(self._module, self._parameters, args, kwargs)


class GraphPool:
    """Memory that graphs share, while there are any.

    A pool whose last graph is gone cannot be captured into again, although memory of it may still be in use
    (torch 2.11, c10/cuda/CUDACachingAllocator.cpp:2799): the next graph begins another one.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._graphs = 0

    def take(self) -> Any:
        """Returns the handle for the capture of a graph."""
        if self._graphs == 0:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs += 1
        return self._handle

    def give_back(self) -> None:
        """Says that one graph is gone."""
        self._graphs -= 1


class CapturedLoss:
    """A loss of one shape, captured.

    Args:
        loss: Of the tensors it is given, on the device: name -> 0-dim; `total` has the graph.
        tensors: An example in the shape of all micro-batches to come; they are copied.
        parameters: Of the engine's module, by their names there.
        hooks: Of the engine that holds them. Their memory must stay in place.
        device: Of the parameters.
        pool: Memory that several share; only one of them may be between its forward pass and the use of its
            gradients.

    Attributes:
        why_not: Why it was not captured, so that the loss has to be computed as any other; None if it was.
            Either it waits for the device, or its forward pass keeps more than half of the memory that was
            free: what runs beside a graph cannot use its memory, not even the same loss in another shape.
            Kernels that fill so much are long enough to be started one by one.
    """

    def __init__(
        self,
        loss: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        tensors: Mapping[str, Tensor],
        *,
        parameters: Mapping[str, nn.Parameter],
        hooks: CaptureHooks,
        device: torch.device,
        pool: GraphPool,
    ) -> None:
        self._loss, self._hooks, self._pool = loss, hooks, pool
        trained = {name: value for name, value in parameters.items() if value.requires_grad}
        self._own = trained
        # Others over the same memory. Of the engine's own DeepSpeed keeps the nodes of autograd, which belong
        # to the stream on which they were made; a capture on another stream ends where they meet.
        self._aliases = {name: nn.Parameter(value.detach()) for name, value in trained.items()}
        self._inputs = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        self._scale = torch.ones((), device=device)
        self._names: tuple[str, ...] = ()
        self._values = self._total = torch.empty(())
        self._gradients: tuple[Tensor | None, ...] = ()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.why_not: str | None = None
        if device.type == "cuda":
            self.why_not = self._warm_up()
            if self.why_not is None:
                self._capture()

    def __call__(self, tensors: Mapping[str, Tensor], *, is_last: bool) -> dict[str, Tensor]:
        """Returns the loss of a micro-batch; the backward pass of `total` gives the parameters gradients.

        Args:
            tensors: On any device, with the names and shapes of the example.
            is_last: Whether no other micro-batch adds to these gradients: they are not copied then, and hold
                until the next call.

        Raises:
            EngineError: If a parameter has been moved since.
        """
        for name, alias in self._aliases.items():
            if alias.data_ptr() != self._own[name].data_ptr():
                raise EngineError(
                    f"performance.graphs: weights must stay in place, got a new {name}. Set it to off."
                )
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._hooks.before_forward()
        if self._graphs:
            self._graphs[0].replay()
        else:
            self._forward()
        values = self._values.clone().unbind()
        found = dict(zip(self._names, values, strict=True))
        passed: Tensor = _Replayed.apply(found["total"], self, is_last, *self._own.values())
        return {**found, "total": passed}

    def close(self) -> None:
        """Gives the memory back to the pool."""
        for graph in self._graphs:
            graph.reset()
            self._pool.give_back()
        self._graphs, self._gradients = [], ()
        self._total = torch.empty(())

    def backward(self, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of `scale` times the total, in the order of the parameters."""
        self._hooks.before_backward()
        self._scale.copy_(scale, non_blocking=True)
        if self._graphs:
            self._graphs[1].replay()
        else:
            self._backward()
        return self._gradients

    def _forward(self) -> None:
        with torch.enable_grad(), self._hooks.direct(self._aliases):
            found = self._loss(self._inputs)
        self._total = found["total"]
        self._names = tuple(found)
        self._values = torch.stack([value.detach().to(self._total.dtype) for value in found.values()])

    def _backward(self) -> None:
        with torch.enable_grad():
            self._gradients = torch.autograd.grad(
                self._total,
                tuple(self._aliases.values()),
                self._scale.to(self._total.dtype),
                allow_unused=True,
            )

    def _warm_up(self) -> str | None:
        """Computes the passes as they will be captured; returns why they cannot be."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._forward()  # compiles, and chooses algorithms
                self._backward()
                self._forget()
                return self._look_at_passes()
        finally:
            self._forget()
            torch.cuda.current_stream().wait_stream(stream)

    def _look_at_passes(self) -> str | None:
        free, before = _free_bytes(), torch.cuda.memory_allocated()
        try:
            # Found here and not by capturing: an error in a capture leaves torch without random numbers.
            with _waiting_refused():
                self._forward()
                kept = torch.cuda.memory_allocated() - before
                self._backward()
        except RuntimeError as error:
            if _WAITED not in str(error):
                raise
            return f"it waits for the device {_place(error)}"
        if kept > _SHARE_OF_FREE * free:
            return f"its forward pass keeps {kept / 1e9:.1f} of {free / 1e9:.1f} GB that are free"
        return None

    def _forget(self) -> None:
        self._total, self._gradients = torch.empty(()), ()

    def _capture(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()  # what is captured takes memory of its own for all that the warm-up took
        for run in (self._forward, self._backward):
            graph = torch.cuda.CUDAGraph()
            # Threads that pin memory go on.
            with torch.cuda.graph(graph, pool=self._pool.take(), capture_error_mode="thread_local"):
                run()
            self._graphs.append(graph)
        # Lets go of the graph of autograd and of the gradients: their memory stays in the pool, where the
        # next capture may use it, too.
        self._total = self._total.detach()
        self._gradients = tuple(None if value is None else _borrowed(value) for value in self._gradients)


def _place(error: BaseException) -> str:
    """Returns where it was raised, outside of torch if any of it was."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename] or frames
    return f"in {outside[-1].name} ({outside[-1].filename}:{outside[-1].lineno})"


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Makes an operation that waits for the device an error; for all threads, while the block runs."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Borrowed:
    """What lies at an address, for `torch.as_tensor`: memory that somebody else keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "typestr": f"<i{tensor.element_size()}",  # the protocol has no bf16
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """Returns another tensor over the memory of one in a graph's pool, which does not keep it from others."""
    return torch.as_tensor(_Borrowed(tensor), device=tensor.device).view(tensor.dtype)


def _free_bytes() -> int:
    """Returns what tensors could still take: free on the device, or held by torch for them."""
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


class _Replayed(torch.autograd.Function):
    """The total as a function of the parameters, whose gradients are those of the captured backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        captured: CapturedLoss,
        is_last: bool,
        *_: Tensor,
    ) -> Tensor:
        ctx.captured, ctx.is_last = captured, is_last
        return total.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        gradients = ctx.captured.backward(scale)
        # Another tensor over the same memory, which autograd takes as it is: engines replace its data.
        own = [
            value if value is None else (value.detach() if ctx.is_last else value.clone())
            for value in gradients
        ]
        return (None, None, None, *own)
