"""Passes that a device can run without the host: nothing in them copies a value from it or to it.

Counted on the CPU by the operations that would make the host wait on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aiprod_ds.testing.gradients import TRANSFORMERS, VAES, subject

_ATEN = torch.ops.aten
# `torch.tensor(...)` ends in a lift; a size that depends on values has to be read.
_WAITING = {
    _ATEN._local_scalar_dense.default,
    _ATEN.lift_fresh.default,
    _ATEN.lift.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.repeat_interleave.Tensor,
    _ATEN._unique2.default,
    _ATEN.unique_consecutive.default,
    _ATEN.bincount.default,
}


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_by_mask = func in {_ATEN.index.Tensor, _ATEN.index_put_.default} and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if func in _WAITING or is_by_mask:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*TRANSFORMERS, *VAES])
def test_passes_do_not_wait(name: str) -> None:
    trained = subject(name)
    batch = trained.batch(0)
    with Waits() as waits:
        trained.loss_of(trained.module, batch).backward()  # type: ignore[no-untyped-call]
    assert waits.found == Counter()


@pytest.mark.parametrize(
    "wait",
    [
        lambda value: torch.tensor([1.0]) + value,
        lambda value: value.sum().item(),
        lambda value: value[value > 0],
        lambda value: bool((value > 0).all()),
        lambda value: value.repeat_interleave(torch.ones(3, dtype=torch.long)),
    ],
)
def test_what_waits_is_seen(wait: Callable[[Tensor], Any]) -> None:
    with Waits() as waits:
        wait(torch.zeros(3))
    assert waits.found.total() > 0
