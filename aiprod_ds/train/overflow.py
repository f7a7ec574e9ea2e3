"""When updates with non-finite gradients end a run, and when a loss scale has fallen so low that gradients
are lost.

Owns three rules over what happened since the process started; a skipped update changes neither weights nor
optimizer.
"""

from __future__ import annotations

import logging
from collections import deque

from aiprod_ds.errors import NonFiniteError

_LOG = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 50
"""A dynamic loss scale of 2^16 needs at most 16 halvings to reach 1, each after 2 overflows."""
STORM_WINDOW, STORM_SKIPPED = 200, 100
"""A scale that fits costs 1 skipped update in 1000."""
COLLAPSED_UPDATES = 100
# What a resumed run takes: precision, clipping and all else of a running phase must stay.
_ADVICE = "Lower the phase's learning_rate_factor, which a running phase takes, and resume"


class OverflowWatch:
    """Judges every update.

    - 50 skipped in a row: no scale helps, the loss itself is not finite. The run ends.
    - 100 skipped of the last 200: a storm, in which most of the time is lost. The run ends.
    - 100 applied in a row at the lowest dynamic scale: small gradients round to zero in fp16. One warning.

    Args:
        lowest_scale: The least that the dynamic loss scale can be; None without one.
    """

    def __init__(self, *, lowest_scale: float | None) -> None:
        self._lowest_scale = lowest_scale
        self._recent: deque[bool] = deque(maxlen=STORM_WINDOW)
        self._skipped_in_a_row = self._at_lowest_in_a_row = 0

    def observe(self, *, is_applied: bool, loss_scale: float, update: int) -> None:
        """Takes one update in.

        Args:
            is_applied: Whether it was; equal on all ranks.
            loss_scale: That its backward pass used.
            update: Applied updates so far.

        Raises:
            NonFiniteError: If the run must end.
        """
        self._recent.append(not is_applied)
        if is_applied:
            self._skipped_in_a_row = 0
            self._watch_scale(loss_scale, update)
            return
        self._skipped_in_a_row += 1
        self._at_lowest_in_a_row = 0
        _LOG.warning("update_skipped after=%d loss_scale=%g reason=non_finite_gradient", update, loss_scale)
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"update {update}: gradients must be finite, got {self._skipped_in_a_row} updates that were "
                f"not. The parameters are as after the last applied update. {_ADVICE}."
            )
        if sum(self._recent) >= STORM_SKIPPED:
            raise NonFiniteError(
                f"update {update}: gradients must be finite, got {sum(self._recent)} of the last "
                f"{len(self._recent)} updates that were not. The parameters are as after the last applied "
                f"update. {_ADVICE}; or raise fp16.loss_scale_window in the engine's settings."
            )

    def explains(self, loss_scale: float) -> bool:
        """Returns whether a skipped update with that scale may be how a dynamic one finds its height."""
        return self._lowest_scale is not None and loss_scale > self._lowest_scale

    def _watch_scale(self, loss_scale: float, update: int) -> None:
        is_lowest = self._lowest_scale is not None and loss_scale <= self._lowest_scale
        self._at_lowest_in_a_row = self._at_lowest_in_a_row + 1 if is_lowest else 0
        if self._at_lowest_in_a_row == COLLAPSED_UPDATES:
            _LOG.warning(
                "loss_scale_collapsed update=%d loss_scale=%g: small gradients round to zero. Lower the "
                "phase's learning_rate_factor, or start a run in bf16",
                update,
                loss_scale,
            )
