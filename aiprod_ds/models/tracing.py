"""Counts what forward and backward hold, compute and move, by running them on the meta device, where nothing
takes memory.

Owns the counting and the stand-ins for kernels that a GPU has and the meta device has not; what is run is the
caller's. Bytes are those that torch's allocator hands out on a GPU (multiples of 512) for tensors that are
alive at the same time; a kernel's own workspace is not seen.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from aiprod_ds.planner.workload import Work, WorkKind, Workload

_ALLOCATION_BYTES = 512  # torch's caching allocator on CUDA rounds up to this
_Note = Callable[[WorkKind, float, float, int], None]
_FORWARD_MATMULS, _BACKWARD_MATMULS = (
    2,
    5,
)  # of fused attention, which computes the scores again in its backward pass


def trace(module: nn.Module, loss: Callable[[], Tensor], *, blocks: Sequence[nn.Module] = ()) -> Workload:
    """Returns what one micro-batch takes.

    Args:
        module: What the engine trains, on the meta device and in the engine's types. Gradients are dropped.
        loss: Makes the batch, runs `module` forward and returns the loss; called once.
        blocks: The repeated ones of `module`, which may be compiled or stand in flat parameters.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    counter = _Counter(ignored=[*module.parameters(), *module.buffers()])
    inside = _Inside(counter)
    curve: list[tuple[int, int]] = []
    done = 0

    def take(parameter: nn.Parameter) -> None:
        nonlocal done
        parameter.grad = (
            None  # as engines do that reduce gradients; those that keep them are the estimate's business
        )
        done += parameter.numel()
        curve.append((done, counter.take_peak()))

    handles = [
        parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        for parameter in trained.values()
    ]
    handles += [handle for block in blocks for handle in inside.watch(block)]
    try:
        with _fused_kernels(counter.note), counter:
            result = loss()
            inside.end()
            saved = counter.held
            curve.append((0, counter.take_peak()))
            torch.autograd.backward(result)
            del result
    finally:
        for handle in handles:
            handle.remove()
    return Workload(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        trained=sum(parameter.numel() for parameter in trained.values()),
        trained_tensors=len(trained),
        largest_trained=max((parameter.numel() for parameter in trained.values()), default=0),
        buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
        saved_bytes=saved,
        curve=tuple(curve),
        work=counter.work(),
        dispatched=counter.dispatched,
        flat_tensors=_flat_tensors(module, blocks),
        block_saved_bytes=inside.saved,
        block_output_bytes=inside.outputs,
        block_share=inside.share,
        block_dispatched=inside.dispatched_share,
    )


def forward_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Returns the most that a forward pass without gradients holds at once, beside the module.

    Args:
        module: As in `trace`.
        forward: Makes the batch and runs `module`; called once.
    """
    counter = _Counter(ignored=[*module.parameters(), *module.buffers()])
    with torch.no_grad(), _fused_kernels(counter.note), counter:
        forward()
    return counter.take_peak()


def _flat_tensors(module: nn.Module, blocks: Iterable[nn.Module]) -> int:
    """Returns how many tensors are trained where the decayed ones of a block are one, and the others."""
    members = [[parameter for parameter in block.parameters() if parameter.requires_grad] for block in blocks]
    inside = {parameter for each in members for parameter in each}
    outside = sum(parameter.requires_grad and parameter not in inside for parameter in module.parameters())
    return outside + sum(len({parameter.ndim > 1 for parameter in each}) for each in members)


class _Inside:
    """Counts what the repeated blocks take of a forward pass."""

    def __init__(self, counter: _Counter) -> None:
        self.saved = self.outputs = 0
        self.share = self.dispatched_share = 0.0
        self._counter = counter
        self._moved = self._dispatched = 0.0
        self._has_ended = False
        self._before: tuple[int, float, int] = (0, 0.0, 0)

    def watch(self, block: nn.Module) -> list[RemovableHandle]:
        """Returns handles of the hooks that count the calls of `block`."""
        return [
            block.register_forward_pre_hook(lambda *_: self._enter()),
            block.register_forward_hook(lambda _module, _inputs, output: self._leave(output)),
        ]

    def end(self) -> None:
        """Takes the shares; what the backward pass computes again is not counted."""
        self._has_ended = True
        moved, dispatched = self._counter.other_bytes, self._counter.dispatched
        self.share = self._moved / moved if moved else 0.0
        self.dispatched_share = self._dispatched / dispatched if dispatched else 0.0

    def _now(self) -> tuple[int, float, int]:
        return self._counter.held, self._counter.other_bytes, self._counter.dispatched

    def _enter(self) -> None:
        self._before = self._now()

    def _leave(self, output: Any) -> None:
        if self._has_ended:
            return
        held, moved, dispatched = (now - then for now, then in zip(self._now(), self._before, strict=True))
        self.saved += int(held)
        self._moved += moved
        self._dispatched += dispatched
        self.outputs += sum(value.nbytes for value in tree_leaves(output) if isinstance(value, Tensor))


@contextmanager
def _fused_kernels(note: _Note) -> Iterator[None]:
    """Lets attention and RMS norm save for the backward pass what the kernels of a GPU save.

    Without it both fall apart into their formulas on the meta device, which keep every score and every fp32
    copy.
    """

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_rest: Any, **_named: Any
    ) -> Tensor:
        out: Tensor = _Attention.apply(query, key, value, attn_mask, note)
        return out

    def rms_norm(
        values: Tensor,
        _normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,  # noqa: ARG001
    ) -> Tensor:
        out: Tensor = _RmsNorm.apply(values, weight, note)
        return out

    kept = functional.scaled_dot_product_attention, functional.rms_norm
    functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = kept


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operation that makes it to the last reference."""

    def __init__(self, *, ignored: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self._peak = self.dispatched = 0
        self.other_bytes = 0.0
        self._sizes: dict[int, int] = {}
        self._ignored = {_key(tensor) for tensor in ignored}
        self._kernels: Counter[tuple[WorkKind, float, float, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dispatched += 1
        outputs = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        if _is_kernel(func, inputs, outputs):
            self._count(func, args, kwargs or {}, out, inputs, outputs)
        return out

    def take_peak(self) -> int:
        """Returns the most that was held at once since the last call."""
        peak, self._peak = self._peak, self.held
        return peak

    def work(self) -> tuple[Work, ...]:
        return tuple(
            Work(kind=kind, flops=flops, moved_bytes=moved, element_bytes=width, count=count)
            for (kind, flops, moved, width), count in self._kernels.items()
        )

    def note(self, kind: WorkKind, flops: float, moved: float, element_bytes: int) -> None:
        """Counts one kernel."""
        if kind is WorkKind.OTHER:
            self.other_bytes += moved
        self._kernels[kind, flops, moved, element_bytes] += 1

    def _hold(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if tensor.device.type != "meta" or key in self._sizes or key in self._ignored:
            return
        size = -(-tensor.untyped_storage().nbytes() // _ALLOCATION_BYTES) * _ALLOCATION_BYTES
        self._sizes[key] = size
        self.held += size
        self._peak = max(self._peak, self.held)
        weakref.finalize(tensor.untyped_storage(), self._release, key)

    def _release(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def _count(
        self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        count_flops = flop_registry.get(func.overloadpacket)
        flops = 0.0 if count_flops is None else float(count_flops(*args, **kwargs, out_val=out))
        is_convolution = "conv" in func.overloadpacket.__name__
        kind = (
            WorkKind.OTHER
            if count_flops is None
            else WorkKind.CONVOLUTION
            if is_convolution
            else WorkKind.MATMUL
        )
        self.note(
            kind,
            flops,
            _moved(*inputs, *outputs),
            max((tensor.element_size() for tensor in inputs), default=0),
        )


def _is_kernel(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Returns whether the operation does anything on a GPU: not if it only looks at memory in another way, or
    reserves it."""
    if func.overloadpacket in _RESERVES or not any(tensor.device.type == "meta" for tensor in outputs):
        return False
    own = {_key(tensor) for tensor in inputs}
    return bool(func._schema.is_mutable) or any(_key(tensor) not in own for tensor in outputs)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _moved(*tensors: Tensor) -> float:
    """Returns the bytes of the elements that are different in memory: of a broadcast tensor each is read
    once."""
    total = 0
    for tensor in tensors:
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += math.prod(sizes) * tensor.element_size()
    return float(total)


class _Attention(torch.autograd.Function):
    """Saves queries, keys, values, output and one fp32 number for each row, as the fused kernels do."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, note: _Note
    ) -> Tensor:
        # Laid out in memory as the queries are, so that joining the heads again is a view.
        out = (
            torch.empty_like(query)
            if query.shape[-1] == value.shape[-1]
            else query.new_empty((*query.shape[:-1], value.shape[-1]))
        )
        row = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, row, mask)
        ctx.note = note
        note(
            WorkKind.ATTENTION,
            _flops(query, key, _FORWARD_MATMULS),
            _moved(query, key, value, out),
            query.element_size(),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        query, key, value, out, _, _ = ctx.saved_tensors
        moved = 2 * _moved(query, key, value, out)
        ctx.note(WorkKind.ATTENTION, _flops(query, key, _BACKWARD_MATMULS), moved, query.element_size())
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class _RmsNorm(torch.autograd.Function):
    """Saves its input, the weight and one fp32 number for each row, as the fused kernel of torch 2.9 and
    later does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor | None, note: _Note) -> Tensor:
        row = torch.empty(values.shape[:-1], dtype=torch.float32, device=values.device)
        ctx.save_for_backward(values, weight, row)
        ctx.note = note
        note(WorkKind.OTHER, 0.0, 2 * _moved(values), values.element_size())
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        values, weight, _ = ctx.saved_tensors
        ctx.note(WorkKind.OTHER, 0.0, 3 * _moved(values), values.element_size())
        return torch.empty_like(values), None if weight is None else torch.empty_like(weight), None


def _flops(query: Tensor, key: Tensor, matmuls: int) -> float:
    return 2.0 * matmuls * query.numel() * key.shape[-2]


_RESERVES = frozenset(
    {
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.detach,
    }
)
