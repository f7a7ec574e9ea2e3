"""How far something is that takes a while: reading media, hashing, downloading, compiling, evaluating.

Owns what a line says and when one is due. Where lines go is a `Display`'s matter: the command line and the
training's console set one up, on the main rank; without one nothing is shown, so that every layer may tell.

The rules: what is done within 2 s is not told of. In a terminal one line is drawn over and over and taken
away at the end; elsewhere a line is written after 2 s, then at most one each 10 s, and one at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

FIRST_SECONDS = 2.0
_LINE_SECONDS = 10.0
_DRAW_SECONDS = 0.2
_Item = TypeVar("_Item")


class Display(Protocol):
    """Shows lines of text."""

    @property
    def is_live(self) -> bool:
        """Whether a line can be drawn over another."""

    def draw(self, line: str | None) -> None:
        """Draws `line` over the last one; None takes that away. Only called if `is_live`."""

    def write(self, line: str) -> None:
        """Writes a line that stays."""


class Listener(Protocol):
    """Is told of every step, on the thread that makes it."""

    def stepped(self) -> None:
        """A step has been made."""

    def began_to_work(self) -> None:
        """A block begins that cannot say how far it is."""

    def ended_to_work(self) -> None:
        """Such a block has ended."""


# The last one shows; a training's console stands on the command line's while it trains.
_displays: list[Display] = []
# Who wants to know that something comes on, whether or not it is shown.
_listeners: list[Listener] = []


def show_on(display: Display) -> None:
    """Makes `display` the one that shows progress, until `hide`."""
    _displays.append(display)


def hide(display: Display) -> None:
    """Takes `display` away. Idempotent."""
    if display in _displays:
        _displays.remove(display)


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """A block in which `listener` is told of progress."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Progress:
    """One thing that is being done.

    Args:
        title: What, so that a count can follow: `evaluating clip`.
        total: Of steps; None where nobody knows.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self._title = title
        self._total = total
        self._display = _displays[-1] if _displays else None
        self._began = time.monotonic()
        self._last_shown: float | None = None
        self._done = 0
        self._note = ""

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Counts steps, and shows them if a line is due.

        Args:
            count: Steps since the last call.
            note: What stands behind the count from now on.
        """
        self._done += count
        self._note = note
        for listener in _listeners:
            listener.stepped()
        self.show()

    def show(self) -> None:
        """Shows how far it is if a line is due."""
        now, display = time.monotonic(), self._display
        if display is None or now - self._began < FIRST_SECONDS:
            return
        pause = _DRAW_SECONDS if display.is_live else _LINE_SECONDS
        if self._last_shown is not None and now - self._last_shown < pause:
            return
        self._last_shown = now
        (display.draw if display.is_live else display.write)(self._line(now - self._began))

    def close(self) -> None:
        """Takes a drawn line away, or writes the last one, if there was any."""
        display, self._display = self._display, None
        if display is None or self._last_shown is None:
            return
        if display.is_live:
            display.draw(None)
        else:
            seconds = time.monotonic() - self._began
            display.write(
                f"{self._counted()}: {'done' if self._is_whole else 'ended'} in {in_clock(seconds)}"
            )

    @property
    def _is_whole(self) -> bool:
        return self._total is None or self._done >= self._total

    def _counted(self) -> str:
        count = f" {self._done:,}" if self._done else ""
        total = f"/{self._total:,}" if count and self._total is not None else ""
        return f"{self._title}{count}{total}" + (f", {self._note}" if self._note else "")

    def _line(self, seconds: float) -> str:
        if self._total is None or not self._done:
            return f"{self._counted()}  {in_clock(seconds)}"
        left = seconds / self._done * max(self._total - self._done, 0)
        return f"{self._counted()}  {in_clock(left)} left"


@contextmanager
def counting(title: str, total: int | None = None) -> Iterator[Progress]:
    """Shows a block that counts its own steps."""
    progress = Progress(title, total)
    try:
        yield progress
    finally:
        progress.close()


def steps(items: Iterable[_Item], title: str, total: int | None = None) -> Iterator[_Item]:
    """Yields `items` and shows how many are done."""
    with counting(title, total) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def working(title: str, *, has_own_bar: bool = False) -> Iterator[None]:
    """Shows how long a block takes that cannot say how far it is.

    A thread of its own tells, because the block itself does not come back in between: do not fork in it.

    Args:
        title: What is done.
        has_own_bar: Whether a library shows more than this in a terminal, where nothing is drawn then.
    """
    with _told_of_work():
        yield from _shown_while_working(title, has_own_bar=has_own_bar)


@contextmanager
def _told_of_work() -> Iterator[None]:
    listeners = tuple(_listeners)
    for listener in listeners:
        listener.began_to_work()
    try:
        yield
    finally:
        for listener in listeners:
            listener.ended_to_work()


def _shown_while_working(title: str, *, has_own_bar: bool) -> Iterator[None]:
    progress, ended = Progress(title), threading.Event()

    def tell() -> None:
        pause = FIRST_SECONDS
        while not ended.wait(pause):
            progress.show()
            pause = 1.0

    if not _displays or (has_own_bar and _displays[-1].is_live):
        yield
        return
    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
        progress.close()


def in_clock(seconds: float) -> str:
    """Returns `h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
