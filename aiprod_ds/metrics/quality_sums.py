"""Sums over clips, of which the measures of a held-out set are means; states of several ranks add up.

Owns the accumulation; what is summed is each kind of quality's own. No distributed calls: the sums are one
tensor that the caller may all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aiprod_ds.errors import DataError


class QualitySums:
    """Accumulates one row of numbers; what measures a kind of clip derives from it.

    Args:
        kind: Of clips, as messages call it.
        fields: What is summed, in the order of the rows; the first is the number of clips.
    """

    def __init__(self, kind: str, fields: Sequence[str]) -> None:
        self._kind = kind
        self._fields = tuple(fields)
        self._sums = torch.zeros(len(fields), dtype=torch.float64)

    def state(self) -> Tensor:
        """Returns the sums so far, 1-D float64 on the CPU; states add, so an all-reduce over ranks is exact
        in meaning."""
        return self._sums.clone()

    def merge(self, state: Tensor) -> None:
        """Adds the `state()` of another accumulator. After an all-reduce, merge the result into a fresh
        one."""
        self._sums += state.to(self._sums)

    def _add(self, row: Sequence[float]) -> None:
        self._sums += torch.tensor(row, dtype=torch.float64)

    def _totals(self) -> dict[str, float]:
        """Returns the sums by field.

        Raises:
            DataError: If no clip was added.
        """
        totals = dict(zip(self._fields, self._sums.tolist(), strict=True))
        if totals[self._fields[0]] == 0:
            raise DataError(
                f"{self._kind} quality: needs at least one clip, got none. Check the validation data."
            )
        return totals
