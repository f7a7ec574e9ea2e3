"""One check and what came of it. Owns the records and how numbers are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_TOLERANCE = 2e-5  # of fp32 sums of some thousand numbers, in whatever order a machine adds them


class CheckFailedError(Exception):
    """What was computed is not what the formula gives; the message has both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something to check.

    Attributes:
        work: Returns in words what was compared, or raises.
        advice: What to do if it fails.
        note: Returns what to do although it passes; empty if there is nothing.
        took: Returns how long it took elsewhere; None: as long as it is waited for.
    """

    name: str
    title: str
    work: Callable[[], str]
    advice: str
    note: Callable[[], str] | None = None
    took: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a check.

    Attributes:
        detail: What was compared, or what was got.
        advice: What to do; empty if there is nothing.
    """

    name: str
    title: str
    is_passed: bool
    seconds: float
    detail: str
    advice: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the outcome for JSON."""
        values = asdict(self)
        values["passed"] = values.pop("is_passed")
        return values


def require_close(what: str, got: float, expected: float, *, tolerance: float = _TOLERANCE) -> None:
    """Checks a number.

    Args:
        what: In words.
        got: What was computed.
        expected: What the formula gives.
        tolerance: Relative; absolute below 1.

    Raises:
        CheckFailedError: If they differ by more.
    """
    if not abs(got - expected) <= tolerance * max(1.0, abs(expected)):
        raise CheckFailedError(f"{what}: must be {expected:.6g}, got {got:.6g}")


def require_equal(what: str, got: object, expected: object) -> None:
    """Checks a value.

    Raises:
        CheckFailedError: If it is another one.
    """
    if got != expected:
        raise CheckFailedError(f"{what}: must be {expected!r}, got {got!r}")
