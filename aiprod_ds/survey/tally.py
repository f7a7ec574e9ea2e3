"""Counts over all files: how many of which kind, how long, what was found how often, and histograms.

Takes rows one by one and keeps none of them, so that its size does not depend on how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiprod_ds.survey.findings import FINDINGS, Level
from aiprod_ds.survey.rows import Row

_NAMED = 5
_DURATIONS = (1, 2, 4, 8, 16, 32, 60, 120, 300, 600, 1800, 3600)
_SHORT_SIDES = (256, 480, 720, 1080, 1440, 2160)
_RATES_HZ = (12.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 48.0, 50.0, 59.94, 60.0, 119.88, 120.0)
_RATE_TOLERANCE = 4e-4  # 23.976 and 24 are 1e-3 apart


@dataclass(slots=True)
class Found:
    """How many files a finding was made of, and the names of some."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.names) < _NAMED:
            self.names.append(name)


@dataclass(slots=True)
class Histogram:
    """Counts by class, in the order of the classes."""

    title: str
    counts: Counter[str] = field(default_factory=Counter)
    order: dict[str, float] = field(default_factory=dict)

    def add(self, label: str, place: float) -> None:
        """Counts one more of a class that stands at `place`."""
        self.counts[label] += 1
        self.order[label] = place

    def bars(self) -> list[tuple[str, int]]:
        """Returns the classes with their counts."""
        return [(label, self.counts[label]) for label in sorted(self.order, key=self.order.__getitem__)]


class Tally:
    """The counts."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.seconds: dict[str, float] = {"film": 0.0, "picture": 0.0, "sound": 0.0}
        self.num_bytes = 0
        self.with_sound = 0
        self.with_captions = 0
        self.levels: Counter[str] = Counter()
        self.found: dict[str, Found] = {}
        self.buckets: dict[str, Counter[str]] = {}
        self.ignored: dict[str, Found] = {}
        self._aspect = Histogram("Aspect ratio as displayed")
        self._size = Histogram("Shorter side as displayed")
        self._duration = Histogram("Duration")
        self._rate = Histogram("Frame rate")
        self._sound = Histogram("Sound: rate and layout")
        self._codec = Histogram("Codec")

    @property
    def num_files(self) -> int:
        """Files that were looked into."""
        return sum(self.files.values())

    @property
    def num_used(self) -> int:
        """Files of which something is trained on."""
        return sum(self.used.values())

    @property
    def total_seconds(self) -> float:
        """How long all films and sounds that are used play."""
        return sum(self.seconds.values())

    def add(self, row: Row) -> None:
        """Counts a file that was looked into."""
        self.files[row.kind] += 1
        self.num_bytes += row.num_bytes
        for found in row.findings:
            self.found.setdefault(found.kind, Found()).add(row.path)
        level = row.level
        self.levels["good" if level is None else level.name.lower()] += 1
        if not row.is_used:
            return
        self.used[row.kind] += 1
        self.seconds[row.kind] += row.seconds
        self.with_sound += row.kind == "film" and row.audio_rate_hz > 0
        self.with_captions += row.captions > 0
        for phase, shape in row.buckets.items():
            self.buckets.setdefault(phase, Counter())[shape] += 1
        self._draw(row)

    def ignore(self, path: str, reason: str) -> None:
        """Counts a file that is not looked into."""
        self.ignored.setdefault(reason, Found()).add(path)

    def problems(self) -> list[tuple[str, Found]]:
        """Returns what was found, the gravest first and of those the most frequent."""
        return sorted(self.found.items(), key=lambda item: (FINDINGS[item[0]].level, -item[1].count))

    def num_at(self, level: Level) -> int:
        """Returns how many files have nothing graver than `level`, and that."""
        return self.levels[level.name.lower()]

    def histograms(self) -> list[Histogram]:
        """Returns those that have something to show."""
        every = (self._aspect, self._size, self._duration, self._rate, self._sound, self._codec)
        return [histogram for histogram in every if histogram.counts]

    def document(self) -> dict[str, Any]:
        """Returns the counts for JSON."""
        return {
            "files": self.num_files,
            "used": dict(self.used),
            "hours": self.total_seconds / 3600,
            "bytes": self.num_bytes,
            "films_with_sound": self.with_sound,
            "with_captions": self.with_captions,
            "levels": dict(self.levels),
            "problems": {
                kind: {
                    "count": found.count,
                    "level": FINDINGS[kind].level.name.lower(),
                    "title": FINDINGS[kind].title,
                    "effect": FINDINGS[kind].effect,
                    "advice": FINDINGS[kind].advice,
                    "examples": found.names,
                }
                for kind, found in self.problems()
            },
            "ignored": {reason: found.count for reason, found in self.ignored.items()},
            "buckets": {phase: dict(shapes) for phase, shapes in self.buckets.items()},
            "histograms": {histogram.title: dict(histogram.bars()) for histogram in self.histograms()},
        }

    def _draw(self, row: Row) -> None:
        if row.height:
            self._aspect.add(row.aspect if row.aspect in _PLAIN_ASPECTS else "other", _aspect_place(row))
            self._size.add(*_classed(min(row.width, row.height), _SHORT_SIDES, " px"))
        if row.seconds:
            self._duration.add(*_duration_class(row.seconds))
        if row.rate_hz:
            self._rate.add(*_rate_class(row))
        if row.audio_rate_hz:
            words = f"{row.audio_rate_hz / 1000:g} kHz {row.audio_layout}".rstrip()
            self._sound.add(words, row.audio_rate_hz * 100 + row.audio_channels)
        if row.codec:
            self._codec.add(row.codec, -1.0 - self._codec.counts[row.codec])  # the most frequent first


_PLAIN_ASPECTS = frozenset(
    {"21:9", "2:1", "16:9", "3:2", "4:3", "5:4", "1:1", "4:5", "3:4", "2:3", "9:16", "1:2"}
)


def _aspect_place(row: Row) -> float:
    if row.aspect not in _PLAIN_ASPECTS:
        return float("inf")
    wide, high = row.aspect.split(":")
    return -int(wide) / int(high)


def _classed(value: float, bounds: tuple[int, ...], unit: str) -> tuple[str, float]:
    for place, bound in enumerate(bounds):
        if value < bound:
            begin = f"under {bound}" if place == 0 else f"{bounds[place - 1]} to {bound - 1}"
            return f"{begin}{unit}", place
    return f"{bounds[-1]}{unit} and more", len(bounds)


def _duration_class(seconds: float) -> tuple[str, float]:
    names = [f"{bound} s" if bound < 60 else f"{bound // 60} min" for bound in _DURATIONS]
    for place, bound in enumerate(_DURATIONS):
        if seconds < bound:
            return (f"under {names[0]}" if place == 0 else f"{names[place - 1]} to {names[place]}"), place
    return f"{names[-1]} and more", len(names)


def _rate_class(row: Row) -> tuple[str, float]:
    if row.variable_rate:
        return "variable", float("inf")
    nearest = min(_RATES_HZ, key=lambda rate: abs(rate - row.rate_hz))
    if abs(nearest - row.rate_hz) <= _RATE_TOLERANCE * nearest:
        return f"{nearest:g} Hz", nearest
    return "other", 1e9


def listed(found: Found) -> Iterator[str]:
    """Yields the names of some files, and how many more there are."""
    yield from found.names
    if found.count > len(found.names):
        yield f"and {found.count - len(found.names):,} more"
