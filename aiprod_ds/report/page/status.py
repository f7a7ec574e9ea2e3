"""How a run stands: going on, ended, or killed; how far it came and how long it still needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiprod_ds.report.curves import Curve, curves_of
from aiprod_ds.report.page.record import RunRecord
from aiprod_ds.report.words import duration

_LAST_UPDATES = 200  # whose median time the rest is expected to take


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a run stands, in the words of the page.

    Attributes:
        kind: running, completed, interrupted, failed or killed; the page colours by it.
        title: One or two words.
        sentence: What it means and what to do.
        planned: Updates of all phases; None if the data or the loss decides.
        share: Of the updates, from 0 to 1; None without `planned`.
        seconds_spent: Training, evaluation and all other time.
        seconds_left: Expected for the rest; None if nothing is left or known.
        error: What ended the run, if it failed.
    """

    kind: str
    title: str
    sentence: str
    updates: int
    planned: int | None
    share: float | None
    seconds_spent: float
    seconds_left: float | None
    error: str = ""

    @property
    def percent(self) -> str:
        """The share as text, `60 %`; never 100 % before the end."""
        if self.share is None:
            return ""
        percent = 100 * self.share
        return f"{math.floor(percent) if percent < 100 else 100} %"


def status_of(run: RunRecord) -> Status:
    """Returns how the run stands at `run.as_of`."""
    curves = curves_of(run.rows)
    told = None if run.report is None else str(run.report.get("status", ""))
    planned = _planned(run)
    updates = run.updates
    kind = told if told in _TITLES else "running" if run.is_running else "killed"
    share = None if not planned else min(updates / planned, 1.0)
    left = None if kind == "completed" else _seconds_left(run.plan, curves, updates)
    percent = "" if share is None else f" at {math.floor(100 * share)} %"
    when = "an unknown time" if run.last_write is None else f"{run.last_write:%Y-%m-%d %H:%M} UTC"
    goes_on = _goes_on(run)
    sentence = {
        "running": f"As of {run.as_of:%Y-%m-%d %H:%M} UTC. The page is written anew at every evaluation; if "
        "that is overdue, the command aiprod-ds report tells whether the run is still alive.",
        "completed": "All phases are done.",
        "interrupted": f"Asked to stop{percent}, and saved. {goes_on}",
        "failed": f"Ended by an error{percent}. {goes_on}",
        "killed": (
            f"The run did not end by itself: it left no report and no process of it is alive. It was killed"
            f"{percent}; its last metrics are of {when}. {goes_on}"
        ),
    }[kind]
    return Status(
        kind=kind,
        title=_TITLES[kind],
        sentence=sentence,
        updates=updates,
        planned=planned,
        share=share,
        seconds_spent=_seconds_spent(run, curves),
        seconds_left=left,
        error=str((run.report or {}).get("error") or ""),
    )


def _goes_on(run: RunRecord) -> str:
    """Returns what the command of the newest start does now."""
    if not any((run.folder / "checkpoints").glob("update_*")):
        return "No checkpoint stands in its folder: the same command starts anew."
    # Which would move this run aside once more.
    is_anew = "--resume never" in str(run.environment.get("command", ""))
    command = "The same command without --resume never" if is_anew else "The same command"
    return f"{command} goes on from the newest checkpoint."


_TITLES = {
    "running": "Running",
    "completed": "Completed",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "killed": "Killed",
}


def time_sentence(status: Status) -> str:
    """Returns how long the run took, and what it still needs, in words."""
    spent = f"{duration(status.seconds_spent)} spent"
    if status.seconds_left is None:
        return spent
    return f"{spent}, about {duration(status.seconds_left)} left"


def _planned(run: RunRecord) -> int | None:
    reported = (run.report or {}).get("planned_updates")
    if isinstance(reported, int) and reported > 0:
        return reported
    total = 0
    for rows in phases_of(run.plan).values():
        updates = rows[0].get("updates") or rows[0].get("max_updates")
        if not isinstance(updates, int):
            return None
        total += updates
    return total or None


def phases_of(plan: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Returns the rows of plan.json by the index of their phase: one for each bucket."""
    phases: dict[int, list[Mapping[str, Any]]] = {}
    for row in plan:
        if isinstance(row.get("phase"), int):
            phases.setdefault(row["phase"], []).append(row)
    return dict(sorted(phases.items()))


def _seconds_spent(run: RunRecord, curves: Mapping[str, Curve]) -> float:
    times = (run.report or {}).get("time_seconds")
    if isinstance(times, dict) and times:
        last = sum(float(value) for value in times.values() if isinstance(value, (int, float)))
        # Of the last start alone; rows and records tell of those before.
        resumed_at = max((update for update, _ in run.starts), default=0)
        return last + (_seconds_recorded(run, curves, until=resumed_at) if resumed_at else 0.0)
    return _seconds_recorded(run, curves, until=run.updates)


def _seconds_recorded(run: RunRecord, curves: Mapping[str, Curve], *, until: int) -> float:
    curve = curves.get("time/update_seconds")
    trained = 0.0
    if curve is not None and len(curve.values):
        finite = curve.values[np.isfinite(curve.values) & (curve.updates <= until)]
        # Of a long run a sample of the rows is read; its mean stands for all.
        trained = float(finite.mean()) * until if len(finite) else 0.0
    evaluated = (record.seconds for record in run.evaluations if record.update <= until)
    return trained + sum(seconds for seconds in evaluated if math.isfinite(seconds))


def _seconds_left(
    plan: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve], updates: int
) -> float | None:
    """Returns what the updates that are left need at the speed of the newest ones, weighed by what one
    update of their phase computes."""
    curve, phases = curves.get("time/update_seconds"), phases_of(plan)
    if curve is None or not phases:
        return None
    times = curve.values[-_LAST_UPDATES:]
    times = times[np.isfinite(times)]
    bounds, first = [], 0
    for rows in phases.values():
        length = rows[0].get("updates") or rows[0].get("max_updates") or rows[0].get("min_updates")
        if not isinstance(length, int):
            return None
        bounds.append((first, first + length, _cost(rows[0])))
        first += length
    if not len(times) or updates >= first:
        return None
    now = next((cost for begin, end, cost in bounds if begin < updates <= end), bounds[0][2])
    own = curve.values[curve.updates > max((b for b, e, _ in bounds if b < updates), default=0)]
    own = own[np.isfinite(own)][-_LAST_UPDATES:]
    pace = float(np.median(own if len(own) else times)) / now
    return sum(max(0, end - max(begin, updates)) * cost for begin, end, cost in bounds) * pace


def _cost(row: Mapping[str, Any]) -> float:
    cost = row.get("pixels_per_update")
    return float(cost) if isinstance(cost, (int, float)) and cost > 0 else 1.0
