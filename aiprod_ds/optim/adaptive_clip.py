"""A gradient clip that follows the norms of the run: mean + deviations * standard deviation, never above the
fixed one.

Owns the statistics of past norms and the limit that follows from them, not the clipping. The loop, once per
update:

    engine.backward(...)                            # of the last micro-batch
    engine.set_clip_norm(clip.limit())
    result = engine.step()
    clip.observe(result.gradient_norm)

Cost: a few additions in Python. The norm of an update is copied to pinned memory without waiting and read by
the next `limit`, when a whole forward and backward of work is queued behind it, so the device does not idle.
(Both engines wait for each norm anyway, inside `step`, to learn whether it is finite: DeepSpeed 0.19.8 in
runtime/utils.py:231.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.config.optim import AdaptiveClipConfig
from aiprod_ds.errors import CheckpointError

_FLOATS = ("mean", "variance", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStatistics:
    """Weighted mean and variance of the finite norms seen so far; the newest weighs 1, the one before it s,
    then s^2, ...

    With s = smoothing, after each finite norm x, in float64:

        weight   = s * weight + 1
        change   = x - mean
        mean     = mean + change / weight
        variance = (1 - 1 / weight) * (variance + change^2 / weight)

    which are exactly sum(w x) / sum(w) and sum(w (x - mean)^2) / sum(w), from the first norm on and without
    bias correction (West 1979, Communications of the ACM 22, 9). Norms are those before clipping, so a
    lasting rise is followed; the price is that one spike lifts the limit for about 1 / (1 - s) updates, where
    the fixed norm alone bounds it.

    Worked numbers: s = 0.5, norms 1, 4: weights 1 and 1.5, mean 1 then 3, variance 0 then 2, limit at 3
    deviations 3 + 3 * 1.41421 = 7.24264.

    Attributes:
        weight: Sum of the norms' weights; 1 / (1 - s) in the long run.
        norms: Finite norms seen, which is what `warmup_updates` counts.
    """

    mean: float = 0.0
    variance: float = 0.0
    weight: float = 0.0
    norms: int = 0

    def observe(self, norm: float, config: AdaptiveClipConfig) -> NormStatistics:
        """Returns the statistics after one more norm; NaN and infinity leave them as they are."""
        if not math.isfinite(norm):  # of an update that the engine skips; one would stay in the mean for good
            return self
        weight = config.smoothing * self.weight + 1.0
        change = norm - self.mean
        return replace(
            self,
            mean=self.mean + change / weight,
            variance=(1.0 - 1.0 / weight) * (self.variance + change * change / weight),
            weight=weight,
            norms=self.norms + 1,
        )

    def limit(self, config: AdaptiveClipConfig, fixed: float | None) -> float | None:
        """Returns the norm to clip at: `fixed` through the warm-up, then the lower of it and mean +
        deviations * deviation."""
        if self.norms < config.warmup_updates:
            return fixed
        adaptive = self.mean + config.deviations * math.sqrt(self.variance)
        if adaptive <= 0.0:  # nothing but zero gradients so far: no scale to judge by
            return fixed
        return adaptive if fixed is None else min(adaptive, fixed)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready mapping; floats as hexadecimal text, so that not a bit is lost."""
        return {name: getattr(self, name).hex() for name in _FLOATS} | {"norms": self.norms}

    @classmethod
    def from_dict(cls, values: object) -> NormStatistics:
        """Returns the statistics saved by `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or out of range.
        """
        damaged = CheckpointError(
            f"adaptive_clip: must be saved statistics, got {values!r}. The checkpoint is damaged; use an "
            "earlier one."
        )
        if not isinstance(values, Mapping) or set(values) != {*_FLOATS, "norms"}:
            raise damaged
        if type(values["norms"]) is not int or values["norms"] < 0:
            raise damaged
        try:
            numbers = {name: float.fromhex(values[name]) for name in _FLOATS}
        except (TypeError, ValueError, OverflowError):
            raise damaged from None
        if not all(math.isfinite(number) and number >= 0.0 for number in numbers.values()):
            raise damaged
        return cls(**numbers, norms=values["norms"])


class AdaptiveClip:
    """The limit for each update. All ranks see the same norm, so all reach the same limit without talking.

    Args:
        fixed: `optimizer.gradient_clip_norm`, which the limit never exceeds; None: nothing but the statistics
            bounds it.
    """

    def __init__(self, config: AdaptiveClipConfig, *, fixed: float | None) -> None:
        self._config = config
        self._fixed = fixed
        self._statistics = NormStatistics()
        self._unread: _HostCopy | None = None

    def limit(self) -> float | None:
        """Returns the norm to clip the coming update at, for `Engine.set_clip_norm`."""
        return self._read().limit(self._config, self._fixed)

    def observe(self, gradient_norm: float | Tensor) -> None:
        """Takes the norm of an update, before clipping; that of a skipped update is not finite and changes
        nothing.

        Args:
            gradient_norm: `UpdateResult.gradient_norm`.
        """
        self._read()  # the one before, if no limit was asked for since: there is room for one
        self._unread = _HostCopy(gradient_norm)

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a JSON-ready mapping; the settings belong to the configuration."""
        return self._read().to_dict()

    def restore(self, values: object) -> None:
        """Takes over the state that `to_dict` returned.

        Raises:
            CheckpointError: If it is damaged.
        """
        self._statistics = NormStatistics.from_dict(values)
        self._unread = None

    def _read(self) -> NormStatistics:
        if self._unread is not None:
            self._statistics = self._statistics.observe(self._unread.value(), self._config)
            self._unread = None
        return self._statistics


class _HostCopy:
    """A number on its way from the device; `value` waits for it."""

    def __init__(self, number: float | Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._number = number
        if isinstance(number, Tensor) and number.is_cuda:
            self._number = number.detach().to("cpu", non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()  # until the device is here, the memory holds anything

    def value(self) -> float:
        if self._done is not None:
            self._done.synchronize()
        return float(self._number)
