"""What a person watches: a live progress block in a terminal, plain lines in a log file, a summary at the
end.

Main rank only, and only through the rich console that the command line passes in (on stderr). No refresh
thread: the display changes when metrics arrive, so worker processes can be forked at any time.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aiprod_ds import progress
from aiprod_ds.metrics.evaluations import EvaluationRecord
from aiprod_ds.metrics.metric_names import find_measure, find_metric, measure_order
from aiprod_ds.report.measures import Outcome, measure_rows, verdict_of
from aiprod_ds.report.summary import RunStatus, RunSummary, phase_history

_OF_NOISE_LEVEL = re.compile(r"_s\d$")  # parts of a loss by noise level: in the report, too many for a line


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """A phase as the display needs it.

    Attributes:
        updates: The most that are planned, the fewest where nothing bounds them.
        description: What it trains on, e.g. `9 frames 64x64, batch 8`.
        relative_cost: Cost of one update in any unit shared by all phases (clips x frames x pixels); weighs
            the time left.
    """

    name: str
    updates: int
    description: str = ""
    relative_cost: float = 1.0


class ConsoleSink:
    """Shows the run's progress from the metrics that pass by, and while it is open that of anything that
    tells `aiprod_ds.progress`, as evaluations do.

    Args:
        console: Where to draw; a live block if it is a terminal, plain lines if not.
        phases: All of the run, in order; those before `first_update` count as done.
        first_update: Updates already done when this process began (a resumed run).
        evaluation_updates: Updates between two evaluations inside phases; the time left counts them.
        interval_seconds: Least time between two plain lines.
        now: Monotonic time in seconds; tests pass their own.
    """

    def __init__(
        self,
        console: Console,
        *,
        phases: Sequence[PhaseSpan],
        first_update: int = 0,
        evaluation_updates: int | None = None,
        interval_seconds: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._phases = tuple(phases)
        self._starts = list(accumulate((phase.updates for phase in phases), initial=0))
        self._interval_seconds = interval_seconds
        self._now = now
        self._update = first_update
        self._phase = -1
        self._metrics: dict[str, float] = {}
        self._measure: tuple[str, str] | None = None
        self._evaluation_updates = evaluation_updates
        self._evaluation_seconds = 0.0
        self._activity: str | None = None
        self._seconds_per_cost: float | None = None
        self._last_line = -float("inf")
        self._is_closed = False
        # Prints of libraries go above the block where they would otherwise tear it.
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=Console().is_terminal
        )
        if console.is_terminal:
            with suppress(OSError):
                self._live.start()
                self._live.update(self._waiting(), refresh=True)
        progress.show_on(self)

    @property
    def is_live(self) -> bool:
        """See `progress.Display`."""
        return self._console.is_terminal

    def draw(self, line: str | None) -> None:
        """See `progress.Display`: shows the line under the block."""
        self._activity = line
        self._refresh()

    def write(self, line: str) -> None:
        """See `progress.Display`."""
        with suppress(OSError):  # standard error may be a file, on a disk that is full
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        """Takes one update; redraws the block, or prints a line if the last one is old enough."""
        self._update = update
        phase = int(metrics.get("clock/phase", self._phase if self._phase >= 0 else self._planned_phase()))
        if phase != self._phase:
            self._enter_phase(phase)
        self._metrics.update((name, metrics[name]) for name in metrics if not _is_measure(name))
        self._note_measure(update, metrics)
        self._learn_speed(metrics)
        if self._console.is_terminal:
            self._refresh()
        elif self._now() - self._last_line >= self._interval_seconds or update == self._starts[-1]:
            self._last_line = self._now()
            self.write(self._line())

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:  # noqa: ARG002  other sinks do
        """Learns how long evaluations take; what is shown of one came as its row."""
        if record.metrics:
            self._evaluation_seconds = record.seconds

    def close(self) -> None:
        """See `Sink.close`: takes the live block away and leaves its last state as text."""
        if self._is_closed:
            return
        self._is_closed = True
        self._activity = None
        progress.hide(self)
        with suppress(OSError):
            self._live.stop()
            if self._console.is_terminal and self._metrics:
                self._console.print(self._block(), highlight=False)

    def _refresh(self) -> None:
        with suppress(OSError):
            self._live.update(self._block() if self._phase >= 0 else self._waiting(), refresh=True)

    def _waiting(self) -> Text:
        return _one_line(self._activity or "waiting for the first update")

    def _enter_phase(self, phase: int) -> None:
        self._phase = phase
        self._seconds_per_cost = None
        span = self._phases[phase]
        title = Text.assemble((f"phase {phase + 1}/{len(self._phases)} ", "dim"), (span.name, "bold cyan"))
        title.append(f"  {span.updates:,} updates" + (f", {span.description}" if span.description else ""))
        self._console.print(title, highlight=False, soft_wrap=True)

    def _planned_phase(self) -> int:
        """Returns the phase that this update should be in; an evaluation may come before any row that
        says."""
        return min(bisect_right(self._starts, self._update), len(self._phases)) - 1

    def _note_measure(self, update: int, metrics: Mapping[str, float]) -> None:
        """Keeps the first measure of an evaluation with its update: it is not of now for long."""
        names = [name.removeprefix("evaluation/") for name in metrics if _is_measure(name)]
        if names:
            name = min(names, key=measure_order)
            value = _number(metrics[f"evaluation/{name}"])
            self._measure = find_measure(name).label, f"{value} at {update:,}"

    def _learn_speed(self, metrics: Mapping[str, float]) -> None:
        if "time/update_seconds" not in metrics:
            return
        latest = metrics["time/update_seconds"] / self._phases[self._phase].relative_cost
        smoothed = self._seconds_per_cost
        self._seconds_per_cost = latest if smoothed is None else 0.9 * smoothed + 0.1 * latest

    def _seconds_left(self) -> float | None:
        if self._seconds_per_cost is None:
            return None
        left = 0.0
        for start, span in zip(self._starts, self._phases, strict=False):
            left += max(0, start + span.updates - max(start, self._update)) * span.relative_cost
        return left * self._seconds_per_cost + self._evaluations_left() * self._evaluation_seconds

    def _evaluations_left(self) -> int:
        """Returns how many there will be: at the ends of phases, and at every multiple of the interval."""
        ends = {end for end in self._starts[1:] if end > self._update}
        if self._evaluation_updates is not None:
            every = self._evaluation_updates
            ends.update(range((self._update // every + 1) * every, self._starts[-1] + 1, every))
        return len(ends)

    def _block(self) -> Group:
        span = self._phases[self._phase]
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, max_width=24)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(
            Text.assemble((span.name, "bold cyan"), (f" {self._phase + 1}/{len(self._phases)}", "dim")),
            ProgressBar(total=self._starts[-1], completed=self._update),
            Text.assemble(
                (f"{self._update:,}/{self._starts[-1]:,}", "bold"),
                ("  " + _clock(self._seconds_left()) + " left", "green"),
            ),
        )
        parts: list[RenderableType] = [grid, _packed(self._terms(), self._console.width)]
        if self._activity is not None:
            parts.append(_one_line(self._activity))
        return Group(*parts)

    def _line(self) -> str:
        span = self._phases[self._phase]
        head = (
            f"{span.name} {self._phase + 1}/{len(self._phases)} update {self._update:,}/{self._starts[-1]:,}"
        )
        terms = "  ".join(f"{label} {value}" for label, value in self._terms())
        return f"{head}  {terms}  {_clock(self._seconds_left())} left"

    def _terms(self) -> list[tuple[str, str]]:
        """Returns (label, value) of what is shown, in the order shown: losses, held-out measures, rate,
        speed, skips."""
        shown = [
            name for name in self._metrics if name.startswith("loss/") and not _OF_NOISE_LEVEL.search(name)
        ]
        terms = [(find_metric(name).label, _number(self._metrics[name])) for name in shown]
        if self._measure is not None:
            terms.append(self._measure)
        if "learning_rate" in self._metrics:
            terms.append(("lr", f"{self._metrics['learning_rate']:.2e}"))
        if "throughput/clips_per_second" in self._metrics:
            terms.append(("clips/s", f"{self._metrics['throughput/clips_per_second']:.1f}"))
        if self._metrics.get("clock/skipped_updates", 0.0) > 0:
            terms.append(("skipped", f"{self._metrics['clock/skipped_updates']:.0f}"))
        return terms


def print_summary(console: Console, summary: RunSummary, *, report: Path) -> None:
    """Prints how the run ended: measures before and after, updates, time, and the path of the page."""
    colour = {RunStatus.COMPLETED: "green", RunStatus.INTERRUPTED: "yellow", RunStatus.FAILED: "red"}[
        summary.status
    ]
    console.print()
    console.print(
        Text.assemble(
            (summary.status.value, f"bold {colour}"),
            f"  {summary.updates:,} of {summary.planned_updates:,} updates in "
            f"{_clock(sum(summary.time_seconds.values()))}{summary.time_scope}",
        ),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("held-out clips")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right")
    for row in measure_rows(summary.metrics):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    verdict = verdict_of(summary.metrics, phase_history(summary))
    if verdict is not None and verdict.outcome is not Outcome.BETTER:
        colour = "bold red" if verdict.outcome is Outcome.WORSE else "yellow"
        console.print(Text(verdict.sentence, style=colour), soft_wrap=True)
    if summary.error is not None:
        console.print(Text(summary.error, style="red"), soft_wrap=True)
    console.print(Text.assemble(("report  ", "dim"), str(report)), soft_wrap=True)


def _is_measure(name: str) -> bool:
    return name.startswith("evaluation/")


def _one_line(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _packed(terms: Sequence[tuple[str, str]], width: int) -> Text:
    """Returns the terms on as many lines of `width` as they need; a label never parts from its value."""
    text, column = Text(), 0
    for label, value in terms:
        length = len(label) + 1 + len(value)
        if column and column + 2 + length > width:
            text.append("\n")
            column = 0
        elif column:
            text.append("  ")
            column += 2
        text.append(f"{label} ", style="dim").append(value, style="bold" if label == "loss" else "")
        column += length
    return text


def _number(value: float) -> str:
    """Returns four significant digits of constant width, so that a live display does not jump.

    Example: 0.12 -> `0.1200`; 0.0000321 -> `3.21e-05`; 12345.6 -> `12346`.
    """
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:#.4g}"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.2e}"


def _clock(seconds: float | None) -> str:
    """Returns `h:mm:ss`, or dashes where nothing is known yet."""
    return "-:--:--" if seconds is None else progress.in_clock(seconds)
