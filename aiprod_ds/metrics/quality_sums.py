"""Sums over clips, of which the measures of a held-out set are means; states of several ranks add up.

Owns the accumulation, and which clips a measure leaves out; what is summed is each kind of quality's own. No
distributed calls: the sums are one tensor that the caller may all-reduce, the clips a list to be gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import NotJudged

Finding = float | str
"""What a measure says of a clip, or in words why it cannot say anything."""
_CLIPS = "clips"
_JUDGED = "/clips"


class QualitySums:
    """Accumulates one row of numbers for each clip; what measures a kind of clip derives from it.

    The mean of a measure is taken over the clips that it could judge. A value that is not a number is no
    reason to leave a clip out: it makes the mean NaN, because that is what a diverged model must look like.

    Args:
        kind: Of clips, as messages call it.
        measures: Those that are means over clips.
        sums: What else is added up.
    """

    def __init__(self, kind: str, measures: Sequence[str], sums: Sequence[str] = ()) -> None:
        self._kind = kind
        self._measures = tuple(measures)
        self._fields = (_CLIPS, *measures, *(measure + _JUDGED for measure in measures), *sums)
        self._sums = torch.zeros(len(self._fields), dtype=torch.float64)
        self._not_judged: list[NotJudged] = []

    @property
    def not_judged(self) -> tuple[NotJudged, ...]:
        """The clips that were added here and that a measure leaves out; merged states bring none."""
        return tuple(self._not_judged)

    def state(self) -> Tensor:
        """Returns the sums so far, 1-D float64 on the CPU; states add, so an all-reduce over ranks is exact
        in meaning."""
        return self._sums.clone()

    def merge(self, state: Tensor) -> None:
        """Adds the `state()` of another accumulator. After an all-reduce, merge the result into a fresh
        one."""
        self._sums += state.to(self._sums)

    def _add(self, clip: str, found: Mapping[str, Finding], sums: Mapping[str, float] | None = None) -> None:
        """Adds one clip by its name."""
        row = dict.fromkeys(self._fields, 0.0) | dict(sums or {}) | {_CLIPS: 1.0}
        for measure, finding in found.items():
            if isinstance(finding, str):
                self._leave_out(clip, measure, finding)
            else:
                row[measure], row[measure + _JUDGED] = finding, 1.0
        self._sums += torch.tensor([row[field] for field in self._fields], dtype=torch.float64)

    def _leave_out(self, clip: str, measure: str, reason: str) -> None:
        self._not_judged.append(NotJudged(clip=clip, measure=measure, reason=reason))

    def _means(self) -> dict[str, float]:
        """Returns the mean of every measure that could judge a clip.

        Raises:
            DataError: If no clip was added.
        """
        totals = self._totals()
        counts = {measure: totals[measure + _JUDGED] for measure in self._measures}
        return {measure: totals[measure] / count for measure, count in counts.items() if count > 0}

    def _totals(self) -> dict[str, float]:
        """Returns the sums by field.

        Raises:
            DataError: If no clip was added.
        """
        totals = dict(zip(self._fields, self._sums.tolist(), strict=True))
        if totals[_CLIPS] == 0:
            raise DataError(
                f"{self._kind} quality: needs at least one clip, got none. Check the validation data."
            )
        return totals


def clip_names(names: Sequence[str] | None, num_clips: int) -> Sequence[str]:
    """Returns `names`, or empty ones for clips that nobody named."""
    return [""] * num_clips if names is None else names


def nan_where_not_finite(values: Tensor) -> Tensor:
    """Returns `values` with NaN in place of infinity, which clipping would turn into an ordinary value."""
    return values.masked_fill(~values.isfinite(), torch.nan)
