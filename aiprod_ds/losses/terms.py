"""What every loss returns: the number to train on and the raw terms to log.

Owns the record and how terms become a total, nothing about any one loss. The trainers read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aiprod_ds.config.losses import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """One evaluation of a loss.

    Attributes:
        total: 0-dim fp32 (fp64 for fp64 inputs), with gradient: the weighted sum that is trained.
        terms: Metric name -> 0-dim detached value, unweighted. Terms of weight 0 are here too: measured, not
            trained.
    """

    total: Tensor
    terms: dict[str, Tensor]


@contextmanager
def graph_for(weight: float) -> Iterator[None]:
    """Computes the term in the body without a graph if its weight is 0.

    It is measured then, not trained, and keeps no activations for a backward pass that never comes.
    """
    with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
        yield


def weights_of(config: LossConfig, now: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the weights of one evaluation of a loss: those of `config`, with what `now` has in place of
    them."""
    return {**config.weights(), **(now or {})}


class LossSum:
    """Adds weighted terms up to a `LossTerms`.

    Worked number: terms 2.0 of weight 0.5 and 7.0 of weight 0 give a total of 1.0 and both raw values in
    `terms`.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._terms: dict[str, Tensor] = {}

    def add(self, name: str, weight: float, value: Tensor) -> None:
        """Adds `weight` times a 0-dim term, which comes out of `graph_for(weight)`.

        The product is skipped rather than taken with 0, because 0 * NaN would poison the total.
        """
        self._terms[name] = value.detach()
        if weight > 0:
            weighted = weight * value
            self._total = weighted if self._total is None else self._total + weighted

    def measure(self, name: str, value: Tensor) -> None:
        """Records a 0-dim number that is never trained."""
        self._terms[name] = value.detach()

    def finish(self, *, total_name: str = "loss/total") -> LossTerms:
        """Returns the record, with the total among its terms."""
        assert self._total is not None, "a loss needs at least one term of positive weight"
        return LossTerms(total=self._total, terms={total_name: self._total.detach(), **self._terms})


def add_kl(total: LossSum, weight: float, kl: Callable[..., Tensor], *, free_bits: float) -> None:
    """Adds the divergence of a posterior: `loss/kl`, and `loss/kl_free_bits` in its place in the total where
    there are free bits.

    Args:
        total: Takes the terms.
        weight: Of the divergence.
        kl: Returns it for a keyword `free_bits`.
        free_bits: In nats; 0 for none.
    """
    with graph_for(weight):
        trained = kl(free_bits=free_bits)
    if free_bits == 0:
        total.add("loss/kl", weight, trained)
        return
    total.add("loss/kl_free_bits", weight, trained)
    with torch.no_grad():
        total.measure("loss/kl", kl(free_bits=0.0))
