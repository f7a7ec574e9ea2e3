"""Numbers as people read them: counts, sizes and times, the same on every page and table of a report."""

from __future__ import annotations

import math


def plural(noun: str, count: int) -> str:
    """Returns the noun, with an s unless there is one of it."""
    return noun if count == 1 else noun + "s"


def count_text(number: int) -> str:
    """Returns a count in three digits: 1234567 -> `1.23 M`."""
    for factor, suffix in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}"
    return str(number)


def bytes_text(number: float) -> str:
    """Returns `3.00 GiB` or `512 MiB`."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Returns `12.3 s`, `4 min 05 s`, `3 h 07 min` or `11 d 8 h`; a dash for what is not finite."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 100 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def four_digits(value: float) -> str:
    """Returns four significant digits: 0.12 -> `0.12`, 0.0000321 -> `3.21e-05`, 12345.6 -> `12,346`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"
