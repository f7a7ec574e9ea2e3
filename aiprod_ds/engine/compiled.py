"""Compiled blocks: the repeated blocks of a model run as kernels that torch.compile makes of their forward.

Owns the switch. Blocks, not the whole model: they are alike, so one compilation serves all of them, takes
seconds where the model takes minutes, and leaves the hooks of engines outside of what is compiled.

Shapes are static: a bucket's first batch compiles, later ones find it. With dynamic shapes an evaluation of
one clip before training would mark batch and tokens dynamic for good, which costs speed in every update.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from aiprod_ds import progress

_PLAIN_CLASS = "_class_without_compilation"
# A block is compiled with and without gradients, in training and for the held-out clips, for each shape.
_ENTRIES_PER_SHAPE = 4
_SPARE_ENTRIES = 8
_KERNEL_ALIGNMENT = 16  # bytes


def set_compiled(blocks: Iterable[nn.Module], *, enabled: bool, backend: str = "inductor") -> None:
    """Switches compilation of `blocks` on or off, in place; parameters and keys of `state_dict` stay.

    Call it while recomputation is off, so that what is recomputed is the compiled forward.

    Args:
        blocks: Each is compiled on its own; those of one class share what is compiled.
        enabled: Off undoes what on did, and is allowed at any time.
        backend: Of torch.compile.
    """
    for block in blocks:
        plain: type[nn.Module] = getattr(type(block), _PLAIN_CLASS, None) or type(block)
        # A subclass, not a wrapper or an instance attribute: keys stay, hooks stay outside, and a deep copy
        # calls itself.
        block.__class__ = _compiled(plain, backend) if enabled else plain  # type: ignore[arg-type]  # mypy: a class is hashable


def leave_unaligned_eager(module: nn.Module) -> tuple[str, ...]:
    """Switches compilation off for blocks with a weight that does not begin at a multiple of 16 bytes;
    returns what was switched off, and why.

    Kernels that inductor makes for a block serve all blocks of its class. They take a parameter to be aligned
    as the first block's was, and read another one with an error that no process survives (torch 2.11,
    _inductor/compile_fx.py, `get_input_idxs_to_check`). An engine that packs weights of odd sizes into one
    buffer makes such.

    Args:
        module: As its engine has it.
    """
    notes = []
    for name, block in module.named_modules():
        if not hasattr(type(block), _PLAIN_CLASS):
            continue
        odd = [own for own, value in block.named_parameters() if value.data_ptr() % _KERNEL_ALIGNMENT]
        if odd:
            set_compiled([block], enabled=False)
            notes.append(
                f"{name} is not compiled: {odd[0]} is not at a multiple of {_KERNEL_ALIGNMENT} bytes"
            )
    return tuple(notes)


@contextmanager
def compiled_shapes(count: int, *, budget: float = 1.0) -> Iterator[None]:
    """Lets torch keep as many compiled forms of one function as a run has shapes, each with a budget.

    Without room it falls back to eager with a warning. The settings are the process's; they are put back.

    Args:
        count: Of shapes that the run trains and evaluates: one a bucket.
        budget: Share of its activations that a compiled function keeps for its backward pass; the rest is
            computed again, what costs least first.
    """
    config: Any = torch._dynamo.config
    functorch: Any = torch._functorch.config
    kept, functorch.activation_memory_budget = functorch.activation_memory_budget, budget
    needed = count * _ENTRIES_PER_SHAPE + _SPARE_ENTRIES
    before = config.recompile_limit, config.accumulated_recompile_limit
    config.recompile_limit = max(before[0], needed)
    config.accumulated_recompile_limit = max(before[1], needed * _SPARE_ENTRIES)
    try:
        with _compilation_shown():
            yield
    finally:
        config.recompile_limit, config.accumulated_recompile_limit = before
        functorch.activation_memory_budget = kept


@contextmanager
def _compilation_shown() -> Iterator[None]:
    """Shows progress whenever torch compiles something, which may be minutes inside of one forward."""
    handler, compiling = torch._dynamo.callback.callback_handler, ExitStack()

    def start(_: Any) -> None:
        compiling.enter_context(progress.working("compiling kernels for a new shape"))

    def end(_: Any) -> None:
        compiling.close()

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        compiling.close()
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)


@functools.cache
def _compiled(plain: type[nn.Module], backend: str) -> type[nn.Module]:
    """Returns the class whose forward is compiled: one for the process, so that a new engine finds it."""
    compiled = torch.compile(plain.forward, dynamic=False, backend=backend)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward, _PLAIN_CLASS: plain})
