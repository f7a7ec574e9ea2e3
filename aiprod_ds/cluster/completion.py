"""Whether a run got to its end: `status` in its report, written by this start and not by an earlier one.

The launcher's exit code does not tell: it is 0 when the launcher itself was killed. Called by the launcher.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

_SHOWN_WITHIN_SECONDS = 30.0  # a network file system may show a new file late on a host that did not write it


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Which report stood in the run folder before the start.

    Attributes:
        path: `report.json`.
        before: What identifies the file; None without one. Reports are replaced by rename, so every one has a
            new identity.
    """

    path: Path
    before: tuple[int, int] | None

    @classmethod
    def of(cls, run_folder: Path) -> Report:
        """Returns the state before a start."""
        path = run_folder / "report.json"
        return cls(path=path, before=_identity(path))

    def status(self) -> str:
        """Returns `status` of this start's report, or `missing`."""
        if self.path.parent.is_dir():
            list(self.path.parent.iterdir())  # makes a network file system look again
        identity = _identity(self.path)
        if identity is None or identity == self.before:
            return "missing"
        try:
            return str(json.loads(self.path.read_text(encoding="utf-8"))["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return "missing"

    def is_completed(self, *, within_seconds: float = _SHOWN_WITHIN_SECONDS) -> bool:
        """Returns whether this start completed the run, waiting a little for its report to be seen here."""
        deadline = time.monotonic() + within_seconds
        while (status := self.status()) == "missing" and time.monotonic() < deadline:
            time.sleep(0.5)
        return status == "completed"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
