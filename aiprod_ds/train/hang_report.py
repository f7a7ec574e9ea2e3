"""Where a rank stands that does not come on, and which of all ranks is to blame, in words.

Owns what is told of a hang; when there is one, `watchdog.py` knows.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# Whoever is in one of these waits for other ranks, not they for it.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Where one rank stands.

    Attributes:
        activity: What it is at, by `Activity`.
        seconds: Since it last came on.
        where: The innermost place of its main thread.
        is_waiting: Whether that is a collective.
    """

    rank: int
    host: str
    update: int
    activity: str
    seconds: float
    where: str
    is_waiting: bool

    def to_json(self) -> str:
        """Returns the status as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankStatus:
        """Returns what `to_json` wrote."""
        return cls(**json.loads(text))


def verdict(problem: str, statuses: Mapping[int, RankStatus], *, world_size: int) -> str:
    """Returns one line that names the ranks to look at.

    Those that do not answer come first: they are stopped, or their host is. Else it is those that are not in
    a collective; if all are in one, they disagree about which.

    Args:
        problem: What was found, by one of them.
        statuses: Of the ranks that answer, by rank.
        world_size: All ranks.
    """
    silent = [rank for rank in range(world_size) if rank not in statuses]
    busy = [status for _, status in sorted(statuses.items()) if not status.is_waiting]
    if silent:
        listed = ", ".join(map(str, silent[:_NAMED])) + (" and more" if len(silent) > _NAMED else "")
        who = f"rank {listed} does not answer: stopped, or gone"
    elif busy:
        who = _listed(busy) + (
            "; the others wait for it" if len(busy) < world_size and world_size > 1 else ""
        )
    else:
        who = "every rank waits for others: " + _listed([statuses[rank] for rank in sorted(statuses)])
    return f"{problem}. {who}"


def innermost(thread: int) -> str:
    """Returns the innermost place of a thread, and the innermost one in this package if that is another."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "unknown"
    places = [*traceback.extract_stack(frame)]
    own = [place for place in places if _PACKAGE in Path(place.filename).parents]
    shown = [places[-1]] if not own or own[-1] is places[-1] else [places[-1], own[-1]]
    return ", called by ".join(_place(place) for place in shown)


def is_waiting_for_others(thread: int) -> bool:
    """Returns whether a thread is inside a collective."""
    frame = sys._current_frames().get(thread)
    names = [] if frame is None else [place.filename for place in traceback.extract_stack(frame)]
    return any(part in name for name in names for part in _COLLECTIVES)


def _listed(statuses: list[RankStatus]) -> str:
    more = f" and {len(statuses) - _NAMED} more" if len(statuses) > _NAMED else ""
    return "; ".join(_words(status) for status in statuses[:_NAMED]) + more


def _words(status: RankStatus) -> str:
    return (
        f"rank {status.rank} on {status.host} is at update {status.update}, in {status.activity} for "
        f"{status.seconds:.0f} s, at {status.where}"
    )


def _place(place: traceback.FrameSummary) -> str:
    path = Path(place.filename)
    name = path.relative_to(_PACKAGE.parent) if _PACKAGE in path.parents else Path(*path.parts[-2:])
    return f"{name}:{place.lineno} in {place.name}"
