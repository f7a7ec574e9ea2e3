"""Wall-clock accounting: every second of a run belongs to exactly one activity, so paused time is not
training time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum


class Activity(Enum):
    """What the run is doing."""

    START = "start"
    TRAIN = "train"
    DATA_WAIT = "data_wait"
    EVALUATION = "evaluation"
    TRANSITION = "transition"
    CHECKPOINT = "checkpoint"


class Stopwatch:
    """Adds up seconds per activity. Begins in `Activity.START`.

    Args:
        now: Monotonic time in seconds; tests pass their own.
        on_switch: Called with each activity that begins, also if it was going on.
    """

    def __init__(
        self,
        *,
        now: Callable[[], float] = time.perf_counter,
        on_switch: Callable[[Activity], None] = lambda _activity: None,
    ) -> None:
        self._now = now
        self._on_switch = on_switch
        self._activity = Activity.START
        self._since = now()
        self._seconds = dict.fromkeys(Activity, 0.0)

    @property
    def activity(self) -> Activity:
        """What time is being counted as right now."""
        return self._activity

    def switch(self, activity: Activity) -> None:
        """Ends the current activity and begins `activity`."""
        now = self._now()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now
        self._on_switch(activity)

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Counts the block as `activity` and then returns to what was going on before, also after an
        error."""
        before = self._activity
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self, activity: Activity) -> float:
        """Returns the seconds of `activity` until now."""
        running = self._now() - self._since if activity is self._activity else 0.0
        return self._seconds[activity] + running

    def breakdown(self) -> dict[str, float]:
        """Returns seconds per activity name until now; the values add up to the time since construction."""
        self.switch(self._activity)
        return {activity.value: seconds for activity, seconds in self._seconds.items()}
