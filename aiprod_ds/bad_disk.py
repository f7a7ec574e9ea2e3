"""What a disk that is full, read-only, failing or gone means: in words for a command, and for a run that goes
on without it.

Owns the rule `report.on_full_disk`, the one warning, the count, and how an `OSError` is told. Checkpoints
have a rule of their own, in `checkpoint/disk.py`; how bytes come to the disk is `files.py` and
`appended_file.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from aiprod_ds.errors import AiprodError, DiskError

T = TypeVar("T")
Rule = Literal["stop", "go_on"]
_LOG = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\.\d+\.tmp$")  # of `files.py`: the user knows the file that it becomes
_MAKE_ROOM = "Make room, or see to the disk"
# What a disk or its mount says of itself; others may be a mistake of a caller.
_OF_DISKS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EIO,
        errno.ENOENT,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.EHOSTDOWN,
        errno.EACCES,
        errno.EPERM,
    }
)
_IN_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Input/output error")


def is_disk_fault(error: BaseException) -> bool:
    """Returns whether `error` is what a disk says; libraries that are not Python's own say it in words."""
    if isinstance(error, OSError):
        return error.errno in _OF_DISKS
    return not isinstance(error, AiprodError) and any(words in str(error) for words in _IN_WORDS)


def fault_in_words(error: BaseException, path: Path | None = None) -> str:
    """Returns what the disk said, and how much is free where `path` is, e.g. `No space left on device (4,096
    of 8,388,608 bytes free)`."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    free = None if path is None else free_in_words(path)
    return reason if free is None else f"{reason} ({free})"


def disk_error(error: BaseException, path: Path | None = None, *, what: str = "what is written") -> DiskError:
    """Returns the error of a command whose write failed.

    Args:
        error: What the write raised; its own file name counts before `path`.
        path: Where it was to go; None without a name: the standard output or error.
        what: What was to be written.
    """
    named = error.filename if isinstance(error, OSError) else None
    place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    unnamed = "standard output" if isinstance(error, OSError) else "a disk"  # of which a library may say more
    where = unnamed if place is None else _TEMPORARY.sub("", str(place))
    return DiskError(f"{where}: must take {what}, got {fault_in_words(error, place)}. {_MAKE_ROOM}.")


@contextmanager
def disk_required(path: Path, what: str = "what is written") -> Iterator[None]:
    """Turns a disk's fault in the body into a `DiskError`, so that other ranks and the user can be told."""
    try:
        yield
    except Exception as error:
        if not is_disk_fault(error):
            raise
        raise disk_error(error, path, what=what) from error


def free_in_words(path: Path) -> str | None:
    """Returns what is free where `path` is or would be, and whether it may be written; None if nobody
    knows."""
    for place in (path, *path.parents):
        try:
            usage, flags = shutil.disk_usage(place), os.statvfs(place).f_flag
        except OSError:
            continue
        read_only = ", mounted read-only" if flags & os.ST_RDONLY else ""
        return f"{usage.free:,} of {usage.total:,} bytes free{read_only}"
    return None


@dataclass(slots=True)
class _Fault:
    """What happened to one kind of file."""

    first: str
    count: int = 0
    outages: int = 0
    is_out: bool = False
    lost: int = 0


class DiskWatch:
    """The writes of one run that are no checkpoint, on the main rank: what fails is told once, counted and
    survived.

    Args:
        folder: The run folder.
        rule: `stop`: the run saves and ends with an error at the next boundary of an update. `go_on`: it
            trains on.
        marker: A file that stands in the folder while the run has it; without it the folder counts as gone,
            and nothing is written into what lies under its mount. None: the folder itself is the sign.
    """

    def __init__(self, folder: Path, *, rule: Rule = "go_on", marker: str | None = None) -> None:
        self._folder = folder
        self._rule = rule
        self._sign = folder if marker is None else folder / marker
        self._faults: dict[str, _Fault] = {}

    def attempt(self, what: str, write: Callable[[], T], *, looks_for_folder: bool = True) -> T | None:
        """Returns what `write` does; None if the disk does not take it, which ends `write` and nothing else.

        Args:
            what: Kind of file, for messages and the count.
            write: Writes it.
            looks_for_folder: Whether nothing is begun where the run folder is gone; not of what is
                collective.
        """
        try:
            if looks_for_folder:
                self.require_folder()
            result = write()
        except Exception as error:
            if not isinstance(error, OSError) and not is_disk_fault(error):
                raise
            self._failed(what, error)
            return None
        self._worked(what)
        return result

    def require_folder(self) -> None:
        """Checks that the run folder is there.

        Raises:
            OSError: If it is gone, as its mount may be.
        """
        try:
            os.stat(self._sign)  # noqa: PTH116  once a row of metrics
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "the run folder is gone: is its disk mounted?", str(self._folder)
            ) from error

    def is_out(self, what: str) -> bool:
        """Returns whether the last write of `what` failed."""
        return what in self._faults and self._faults[what].is_out

    def give_up(self, what: str, count: int, unit: str) -> None:
        """Notes that `count` pieces of `what` are lost for good."""
        fault = self._faults[what]
        if count > fault.lost:
            _LOG.warning("given_up what=%s %s=%d folder=%s", what, unit, count, self._folder)
            fault.lost = count

    @property
    def wants_stop(self) -> bool:
        """Whether the run is to save and leave."""
        return self._rule == "stop" and bool(self._faults)

    def notes(self) -> tuple[str, ...]:
        """Returns what failed since the start of this process, in words."""
        return tuple(
            f"{what}: {fault.count:,} writes failed, first: {fault.first}; {_outcome(fault)}"
            for what, fault in sorted(self._faults.items())
        )

    def require_no_fault(self) -> None:
        """Checks what the rule `stop` demands.

        Raises:
            DiskError: If a write has failed, and the rule is `stop`.
        """
        if self.wants_stop:
            raise DiskError(
                f"{self._folder}: must take what the run writes, got {'; '.join(self.notes())}. "
                f"{_MAKE_ROOM}, and start the same command: it goes on from the newest checkpoint. To train "
                "on without, set report.on_full_disk: go_on."
            )

    def require_written(self, what: str) -> None:
        """Checks that the last write of `what` did not fail, whatever the rule.

        Raises:
            DiskError: If it did.
        """
        if self.is_out(what):
            raise DiskError(
                f"{self._folder}: must take {what} at the end of the run, got {self._faults[what].first}. "
                f"{_MAKE_ROOM}, and start the same command: it trains no more than is left and writes it."
            )

    def _failed(self, what: str, error: BaseException) -> None:
        words = fault_in_words(error, self._folder)
        fault = self._faults.setdefault(what, _Fault(words))
        fault.count += 1
        if not fault.is_out:
            fault.is_out = True
            fault.outages += 1
            if fault.outages & (fault.outages - 1) == 0:  # one that comes and goes is told less and less
                _LOG.warning(
                    "not_written what=%s folder=%s error=%s rule=%s", what, self._folder, words, self._rule
                )

    def _worked(self, what: str) -> None:
        fault = self._faults.get(what)
        if fault is not None and fault.is_out:
            fault.is_out = False
            if fault.outages & (fault.outages - 1) == 0:
                _LOG.warning("written_again what=%s folder=%s failed=%d", what, self._folder, fault.count)


def _outcome(fault: _Fault) -> str:
    lost = f", {fault.lost:,} are lost" if fault.lost else ""
    return f"{'the last failed too' if fault.is_out else 'later ones did not'}{lost}"
