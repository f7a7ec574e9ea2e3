"""Whether the two sides of adversarial training still teach each other anything.

Owns the rules over what happened since the process started; they warn and change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

WINDOW_UPDATES = 100
WINS, LOSES, DOMINATES = 0.98, 0.05, 10.0

_REAL, _FAKE = "discriminator/real_accuracy", "discriminator/fake_accuracy"
_RATIO = "discriminator/gradient_ratio"


class CollapseWatch:
    """Judges means over 100 updates, and warns where the judgement changes.

    - Both accuracies above 0.98: the discriminator has won, and its gradient says little.
    - One of them below 0.05: it gives one answer to everything.
    - Gradient ratio above 10: the model follows the discriminator and not the clips.
    - No update of the discriminator applied: its gradients are not finite.
    """

    def __init__(self) -> None:
        self._window: list[dict[str, Tensor]] = []
        self._num_applied = 0
        self._last: str | None = None

    def observe(self, terms: Mapping[str, Tensor], *, is_applied: bool, update: int) -> None:
        """Takes one update in; reads the device once in 100 of them.

        Args:
            terms: Of its last micro-batch on this rank.
            is_applied: Whether the discriminator's update was.
            update: Applied updates of the run so far.
        """
        self._window.append({name: terms[name] for name in (_REAL, _FAKE, _RATIO) if name in terms})
        self._num_applied += is_applied
        if len(self._window) < WINDOW_UPDATES:
            return
        found = judgement(_means(self._window), num_applied=self._num_applied)
        self._window.clear()
        self._num_applied = 0
        if found is not None and found != self._last:
            _LOG.warning("adversarial_training update=%d %s", update, found)
        self._last = found


def judgement(means: Mapping[str, float], *, num_applied: int) -> str | None:
    """Returns in words what is wrong; None if nothing is.

    Args:
        means: Of a window; the ratio is missing where the model was not trained against the discriminator.
        num_applied: Updates of the discriminator that were applied in it.
    """
    if num_applied == 0:
        return "the discriminator's gradients are not finite: none of its updates was applied. Lower its rate"
    real, fake = means[_REAL], means[_FAKE]
    if min(real, fake) > WINS:
        return (
            f"the discriminator has won: it tells {real:.0%} of the data and {fake:.0%} of reconstructions. "
            "Lower its learning rate, or give it lecam_weight or r1_weight"
        )
    if min(real, fake) < LOSES:
        return (
            f"the discriminator gives one answer: right for {real:.0%} of the data and {fake:.0%} of the "
            "reconstructions. Raise its learning rate or lower its regularisers"
        )
    if means.get(_RATIO, 0.0) > DOMINATES:
        return (
            f"the adversarial gradient is {means[_RATIO]:.1f} times that of the other terms. Lower "
            "adversarial_weight or max_adaptive"
        )
    return None


def _means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    names = sorted({name for row in window for name in row})
    means = [torch.stack([row[name].float() for row in window if name in row]).mean() for name in names]
    return dict(zip(names, torch.stack(means).tolist(), strict=True))
