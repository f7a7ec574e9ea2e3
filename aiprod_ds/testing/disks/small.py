"""A small file system of the test's own, which can be full, read-only and gone, in a process of its own.

Owns the mount namespace, which needs a kernel that lets users make one, and the changes of the disk while a
program uses it.
"""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ENTER = ("unshare", "--map-root-user", "--mount", "--")


def why_not(folder: Path) -> str | None:
    """Returns why a process on this machine cannot mount anything; None if it can."""
    command = [*_ENTER, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if tried.returncode == 0 else tried.stderr.strip() or f"exit code {tried.returncode}"


def in_own_mounts(command: list[str]) -> list[str]:
    """Returns the command line of a process whose mounts nobody else sees and which end with it."""
    return [*_ENTER, *command]


@dataclass(slots=True)
class SmallDisk:
    """A file system of `megabytes`, mounted at `folder`; for a process in mounts of its own.

    What covers it, read-only or empty, is mounted on top: what was opened below stays open, as it does on a
    disk that the kernel makes read-only.

    Args:
        folder: Exists and is empty.
        below: Exists and is empty; the file system is seen there, too, whatever covers `folder`.
        megabytes: Its size.
    """

    folder: Path
    below: Path
    megabytes: int = 8

    def mount(self) -> None:
        """Makes it."""
        _mount("-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.below))
        _mount("--bind", str(self.below), str(self.folder))

    def fill(self) -> None:
        """Leaves no byte."""
        block = bytes(4096)
        with (self.below / "ballast").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(block)
            except OSError as error:
                assert error.errno == errno.ENOSPC, "nothing else ends it"

    def make_room(self) -> None:
        """Ends `fill`."""
        (self.below / "ballast").unlink()

    def make_read_only(self) -> None:
        """Lets nothing be opened for writing until `uncover`."""
        _mount("--bind", str(self.below), str(self.folder))
        _mount("-o", "remount,bind,ro", str(self.folder))

    def take_away(self) -> None:
        """Leaves an empty folder, as where a disk is not mounted, until `uncover`."""
        _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self.folder))

    def uncover(self) -> None:
        """Ends `make_read_only` and `take_away`."""
        subprocess.run(["umount", str(self.folder)], check=True, timeout=30)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=30)
