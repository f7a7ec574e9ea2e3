"""What the values of people's items mean: the range that they are in, and whether the first ones look like
it.

Owns conversion to [-1,1] and the rules by which a wrong range, damage and empty clips are found before
anything is trained on them. Which tensor an item holds is `items.py`'s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiprod_ds.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)

ValueRange = tuple[float, float]
RANGES: tuple[ValueRange, ...] = ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0))
FIRST_ITEMS = 16
"""Of a dataset; their values are looked at before training."""

_BYTES, _UNIT, _SIGNED = RANGES[2], RANGES[1], RANGES[0]
_CLIPPED_SHARE = 0.005  # of the range's width beyond it: more than rounding
_FOREIGN_SHARE = 0.25  # more than filters and lossy codecs overshoot
_FLAT_SHARE = 1e-4  # of the range's width: less than half a step of 8 bits, and -80 dB
_NAMED_ITEMS = 3


def require_range(value_range: Any) -> ValueRange | None:
    """Returns a declared range.

    Args:
        value_range: (-1, 1), (0, 1), (0, 255) or None: nothing is declared.

    Raises:
        ConfigError: If it is another one.
    """
    if value_range is None:
        return None
    try:
        low, high = (float(bound) for bound in value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if (low, high) not in RANGES:
        raise ConfigError(
            f"value_range: must be {_listed(RANGES)}, got {value_range!r}. Convert the items, or name the "
            "range that they are in."
        )
    return low, high


def to_signed(values: Tensor, value_range: ValueRange | None) -> Tensor:
    """Returns pixels or samples as floating numbers in [-1,1].

    uint8 x is x / 127.5 - 1 whatever is declared, int16 x is x / 32768. Of floating x: x itself in (-1, 1)
    and where nothing is declared, 2 x - 1 in (0, 1), x / 127.5 - 1 in (0, 255).
    Worked number: 255 of uint8 is 1.0, 0 is -1.0, 51 is -0.6.

    Args:
        values: Of any shape, uint8, int16 or floating.
        value_range: That of floating values.
    """
    if values.dtype == torch.uint8:
        return values.float().div(127.5).sub(1.0)
    if values.dtype == torch.int16:
        return values.float().div(32768.0)
    if value_range in (None, _SIGNED):
        return values
    return values.float().div(127.5).sub(1.0) if value_range == _BYTES else values.float().mul(2.0).sub(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The least and the greatest value of one item."""

    name: str
    low: float
    high: float
    dtype: torch.dtype

    @property
    def is_finite(self) -> bool:
        return abs(self.low) < float("inf") and abs(self.high) < float("inf")


class ValueCheck:
    """Looks at the first items of a dataset.

    Args:
        what: How messages name what the items hold: `video`, `audio` or `latents`. Of latents nothing is
            said about a range.
        value_range: As it was declared.
        is_held_out: Whether nothing is learned from the items: then all may be constant.
    """

    def __init__(self, what: str, value_range: ValueRange | None, *, is_held_out: bool = False) -> None:
        self._what = what
        self._is_held_out = is_held_out
        self._declared = value_range
        self._seen: list[_Seen] = []

    @property
    def is_full(self) -> bool:
        """Whether enough items were seen."""
        return len(self._seen) >= FIRST_ITEMS

    def see(self, values: Tensor, name: str) -> None:
        """Takes in one item: its tensor in the type and range that it has; `name` is for messages.

        Raises:
            DataError: If a value is NaN or infinite.
        """
        if values.is_meta or not values.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(values))  # of NaN both are NaN
        seen = _Seen(name=name, low=low, high=high, dtype=values.dtype)
        if not seen.is_finite:
            raise DataError(f"{name}: {self._what} must be finite, got NaN or infinity. Repair or drop it.")
        self._seen.append(seen)

    def judge(self) -> tuple[str, ...]:
        """Returns, and logs, what is doubtful about the items seen so far, in words.

        Raises:
            DataError: If they cannot be right: beyond the declared range, in another one, or all constant.
        """
        notes = [*self._range_notes(), *self._flat_notes()] if self._seen else []
        for note in notes:
            _LOG.warning("values %s", note)
        return tuple(notes)

    def _range_notes(self) -> list[str]:
        if self._what == "latents":
            return []
        of_bytes = [seen for seen in self._seen if seen.dtype == torch.uint8]
        if 0 < max((seen.high for seen in of_bytes), default=0.0) <= 1:
            raise DataError(
                f"{of_bytes[0].name}: uint8 must be in 0..255, got nothing above 1 in the first "
                f"{len(of_bytes)} items, which is black. Multiply by 255, or convert 0..1 to floating "
                "numbers and pass value_range=(0, 1)."
            )
        floats = [seen for seen in self._seen if seen.dtype.is_floating_point]
        if not floats:
            return []
        low, high = min(seen.low for seen in floats), max(seen.high for seen in floats)
        bounds = self._declared or _SIGNED
        excess = max(bounds[0] - low, high - bounds[1], 0.0) / (bounds[1] - bounds[0])
        if excess > _FOREIGN_SHARE:
            raise self._foreign(floats, low, high, bounds)
        if bounds == _BYTES and 0 < high <= 1:
            raise self._foreign(floats, low, high, bounds)
        notes = []
        if excess > _CLIPPED_SHARE:
            notes.append(
                f"{self._what}: some values of the first {len(floats)} items are beyond {_text(bounds)} "
                f"([{low:g}, {high:g}]) and are clipped"
            )
        if bounds == _SIGNED and low >= 0 and high > 0:
            words = (
                f"nothing below 0 in the first {len(floats)} items ([{low:g}, {high:g}]), so they are "
                "probably in (0, 1)"
            )
            if self._declared is None:
                raise DataError(
                    f"{floats[0].name}: {self._what} must be in (-1, 1) where nothing is declared, got "
                    f"{words}. Pass value_range=(0, 1), or value_range=(-1, 1) if they are right."
                )
            notes.append(f"{self._what}: {words}; value_range=(-1, 1) was declared")
        return notes

    def _foreign(self, floats: list[_Seen], low: float, high: float, bounds: ValueRange) -> DataError:
        fitting = next((known for known in (_UNIT, _SIGNED, _BYTES) if _is_of(low, high, known)), None)
        if fitting is not None:
            advice = f"They look like {_text(fitting)}: pass value_range={_text(fitting)}."
        elif self._what == "audio":
            advice = "Divide integer samples by their full scale (16 bits: 32768)."
        else:
            advice = "Convert them, or name their range with value_range."
        farthest = max(floats, key=lambda seen: max(abs(seen.low), abs(seen.high)))
        declared = "declared" if self._declared is not None else "taken where nothing is declared"
        return DataError(
            f"{farthest.name}: {self._what} must be in {_text(bounds)}, which is {declared}, got "
            f"[{low:g}, {high:g}] in the first {len(floats)} items. {advice}"
        )

    def _flat_notes(self) -> list[str]:
        flat = [seen for seen in self._seen if seen.high - seen.low <= _FLAT_SHARE * self._width(seen)]
        if not flat:
            return []
        kind = self._flat_kind(flat)
        if len(flat) == len(self._seen) and not self._is_held_out:
            raise DataError(
                f"{flat[0].name}: {self._what} must hold something to learn from, got {kind} in all of the "
                f"first {len(flat)} items. Look at what the dataset returns."
            )
        more = len(flat) - _NAMED_ITEMS
        names = ", ".join(seen.name for seen in flat[:_NAMED_ITEMS]) + (
            f" and {more} more" if more > 0 else ""
        )
        return [f"{self._what}: {len(flat)} of the first {len(self._seen)} items hold {kind}: {names}"]

    def _flat_kind(self, flat: list[_Seen]) -> str:
        if self._what == "audio":
            return "silence or one constant value"
        lowest = (self._declared or _SIGNED)[0]
        is_black = self._what == "video" and all(
            seen.low == (0.0 if seen.dtype == torch.uint8 else lowest) for seen in flat
        )
        return "black alone" if is_black else "one constant value"

    def _width(self, seen: _Seen) -> float:
        if seen.dtype == torch.uint8:
            return 255.0
        if seen.dtype == torch.int16:
            return 65536.0
        low, high = self._declared or _SIGNED
        return high - low


def _is_of(low: float, high: float, bounds: ValueRange) -> bool:
    margin = _CLIPPED_SHARE * (bounds[1] - bounds[0])
    return bounds[0] - margin <= low and high <= bounds[1] + margin


def _text(bounds: ValueRange) -> str:
    return f"({bounds[0]:g}, {bounds[1]:g})"


def _listed(ranges: tuple[ValueRange, ...]) -> str:
    return " or ".join(map(_text, ranges))
