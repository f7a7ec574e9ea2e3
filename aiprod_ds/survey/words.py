"""The survey's facts in words, the same in the terminal and on the page."""

from __future__ import annotations

from aiprod_ds.report.words import duration, plural
from aiprod_ds.survey.findings import Level
from aiprod_ds.survey.rows import Row
from aiprod_ds.survey.tally import Tally

_LEVEL_WORDS = {
    Level.LEFT_OUT: "left out",
    Level.LOOK: "to look at",
    Level.TREATED: "brought into shape",
    None: "as they should be",
}
_DECIMAL = 1000


def level_words(level: Level | None) -> str:
    """Returns how grave it is, of several files."""
    return _LEVEL_WORDS[level]


def totals(tally: Tally) -> str:
    """Returns how much there is of what can be used: `12 films (3 min 10 s), 4 pictures, 1.2 GB`."""
    words = []
    for kind in ("film", "picture", "sound"):
        if count := tally.used[kind]:
            seconds = tally.seconds[kind]
            words.append(f"{count:,} {plural(kind, count)}" + (f" ({duration(seconds)})" if seconds else ""))
    if tally.with_sound:
        words.append(f"{tally.with_sound:,} with sound")
    if tally.with_captions:
        words.append(f"{tally.with_captions:,} with a caption")
    return ", ".join([*words, disk_words(tally.num_bytes)])


def disk_words(num_bytes: int) -> str:
    """Returns bytes as shops and file managers count them: `1.2 GB`."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < _DECIMAL:
            return f"{value:.3g} {unit}"
        value /= _DECIMAL
    return f"{value:,.3g} TB"


def size_words(row: Row) -> str:
    """Returns the displayed size, width first, and the stored one where it is another."""
    if not row.height:
        return ""
    shown, stored = f"{row.width}x{row.height}", f"{row.stored_width}x{row.stored_height}"
    return shown if shown == stored else f"{shown} (stored {stored})"


def rate_words(row: Row) -> str:
    """Returns the frames a second."""
    if not row.rate_hz:
        return ""
    return f"{row.rate_hz:.5g} Hz" + (" variable" if row.variable_rate else "")


def time_words(row: Row) -> str:
    """Returns how long it plays, and of how many frames."""
    if not row.seconds:
        return ""
    return duration(row.seconds) + (f", {row.frames:,} frames" if row.frames else "")


def printable(text: str) -> str:
    """Returns text that can be written as UTF-8: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
