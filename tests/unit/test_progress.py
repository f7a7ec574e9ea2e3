"""When progress is shown, and what a line says."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from aiprod_ds import progress
from aiprod_ds.report.progress_line import ProgressLine, shown_on


class Hands:
    """Stands for the time module; moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time


class Screen:
    """Keeps what it is asked to show."""

    def __init__(self, *, is_live: bool) -> None:
        self.is_live = is_live
        self.drawn: list[str | None] = []
        self.written: list[str] = []

    def draw(self, line: str | None) -> None:
        self.drawn.append(line)

    def write(self, line: str) -> None:
        self.written.append(line)


@pytest.fixture(autouse=True)
def _no_other_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_displays", [])


@pytest.fixture(name="hands")
def _hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(progress, "time", hands)
    return hands


@pytest.fixture(name="screen", params=[True, False], ids=["terminal", "log"])
def _screen(request: pytest.FixtureRequest) -> Iterator[Screen]:
    screen = Screen(is_live=request.param)
    progress.show_on(screen)
    yield screen
    progress.hide(screen)


def run(hands: Hands, *, count: int, seconds_each: float) -> None:
    for _ in progress.steps(range(count), "reading media", count):
        hands.time += seconds_each


def test_what_takes_below_two_seconds_is_not_told_of(hands: Hands, screen: Screen) -> None:
    run(hands, count=100, seconds_each=0.019)
    assert (screen.drawn, screen.written) == ([], [])


def test_lines_are_sparse_in_a_log_and_dense_in_a_terminal(hands: Hands, screen: Screen) -> None:
    """50 steps of 0.5 s. In a log: at 2 s, 12 s, 22 s and the end. In a terminal: at each step from 2 s."""
    run(hands, count=50, seconds_each=0.5)
    if screen.is_live:
        assert screen.written == []
        assert screen.drawn[0] == "reading media 4/50  0:00:23 left"
        assert screen.drawn[-1] is None
        assert len(screen.drawn) == 48  # steps 4 to 50, and taking the line away
    else:
        assert screen.drawn == []
        assert screen.written == [
            "reading media 4/50  0:00:23 left",
            "reading media 24/50  0:00:13 left",
            "reading media 44/50  0:00:03 left",
            "reading media 50/50: done in 0:00:25",
        ]


def test_a_count_without_a_total_shows_what_has_passed(hands: Hands, screen: Screen) -> None:
    with progress.counting("finding media") as shown:
        hands.time += 3
        shown.advance(1200, note="3 hidden")
    assert (screen.drawn + screen.written)[0] == "finding media 1,200, 3 hidden  0:00:03"


def test_what_breaks_off_says_so(hands: Hands, screen: Screen) -> None:
    def broken() -> Iterator[int]:
        hands.time += 3
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(progress.steps(broken(), "encoding", 10))
    if not screen.is_live:
        assert screen.written[-1] == "encoding 1/10: ended in 0:00:03"


def test_a_block_that_never_comes_back_is_told_of_by_a_thread(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.01)
    told = threading.Event()
    for name in ("draw", "write"):
        monkeypatch.setattr(screen, name, lambda line: (screen.drawn.append(line), told.set()))
    with progress.working("loading the model"):
        assert told.wait(10)
    assert str(screen.drawn[0]).startswith("loading the model  0:00:0")
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_without_a_display_nothing_happens_and_no_thread_starts(hands: Hands) -> None:
    run(hands, count=3, seconds_each=5)
    with progress.working("loading the model"):
        assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_the_line_of_a_console(hands: Hands) -> None:
    """In a log no line is wrapped, however narrow it is; in a terminal it is cut and taken away."""
    log, terminal = io.StringIO(), io.StringIO()
    title = "reading the media of " + "a/very/long/folder" * 10
    for console in (
        Console(file=log, width=40),
        Console(file=terminal, width=40, force_terminal=True, color_system=None),
    ):
        with shown_on(console), progress.counting(title, 2) as shown:
            hands.time += 5
            shown.advance()
        run(hands, count=2, seconds_each=5)  # no longer shown
    assert log.getvalue().splitlines() == [f"{title} 1/2  0:00:05 left", f"{title} 1/2: ended in 0:00:05"]
    assert "reading the media of a/very/long/folder" in terminal.getvalue()
    assert "0:00:05" not in terminal.getvalue()
    ProgressLine(Console(file=io.StringIO())).draw(None)  # nothing is there to take away


def test_the_last_display_shows(hands: Hands) -> None:
    first, second = Screen(is_live=False), Screen(is_live=False)
    progress.show_on(first)
    progress.show_on(second)
    run(hands, count=1, seconds_each=3)
    progress.hide(second)
    progress.hide(second)
    run(hands, count=1, seconds_each=3)
    progress.hide(first)
    assert [len(screen.written) for screen in (first, second)] == [2, 2]
