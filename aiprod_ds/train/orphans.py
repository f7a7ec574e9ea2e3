"""Whether the launcher that started this process still runs.

DeepSpeed's launcher does not take its ranks with it when it is killed. Owns who counts as a launcher: of the
ancestors of this process, DeepSpeed's programs, `aiprod-ds launch` and `launch/train_local.sh`. A shell, a
batch system's script or an init is none, so that a run whose terminal has been closed goes on. Linux only;
elsewhere nobody is found.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

_PROGRAMS = frozenset({"deepspeed", "aiprod-ds", "train_local.sh"})
_VARIABLE = "AIPROD_DS_LAUNCHER"
_MODULES = ("deepspeed.launcher.", "aiprod_ds")
_STATE, _PARENT, _STARTED = 0, 1, 19  # places in /proc/PID/stat behind the name, see proc(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    number: int
    started: str  # a number may be given to another process
    words: str

    def is_there(self) -> bool:
        fields = _fields(self.number)
        return fields is not None and fields[_STARTED] == self.started and fields[_STATE] not in "ZX"


@dataclass(frozen=True, slots=True)
class Launchers:
    """The launchers of one process."""

    processes: tuple[_Process, ...] = ()

    @classmethod
    def of_this_process(cls) -> Self:
        """Returns the launchers among this process's ancestors, and the one that the environment names."""
        found, number = _named_launcher(), os.getppid()
        while number > 1 and (fields := _fields(number)) is not None:
            command = _command(number)
            if _is_launcher(command):
                found.append(_Process(number=number, started=fields[_STARTED], words=" ".join(command)))
            number = int(fields[_PARENT])
        return cls(tuple(found))

    @staticmethod
    def environment_of_this_process() -> dict[str, str]:
        """Returns what makes this process a launcher of ranks on its host that do not descend from it, as
        behind ssh."""
        fields = _fields(os.getpid())
        if fields is None:
            return {}
        return {_VARIABLE: f"{socket.gethostname()}:{os.getpid()}:{fields[_STARTED]}"}

    def gone(self) -> str | None:
        """Returns a launcher that does not run any more, in words; None if all do."""
        for process in self.processes:
            if not process.is_there():
                return f"process {process.number} ({process.words[:80]})"
        return None


def _named_launcher() -> list[_Process]:
    host, _, rest = os.environ.get(_VARIABLE, "").partition(":")
    number, _, started = rest.partition(":")
    if host != socket.gethostname() or not number.isdigit():
        return []
    return [_Process(number=int(number), started=started, words="aiprod-ds launch")]


def _is_launcher(command: Sequence[str]) -> bool:
    """Returns whether a command line, at most `python -u -m MODULE` or `python PROGRAM`, is a launcher's."""
    is_program = any(Path(word).name in _PROGRAMS for word in command[:2])
    modules = [command[at + 1] for at, word in enumerate(command[:-1]) if word == "-m"][:1]
    return is_program or any(
        module == name or (name.endswith(".") and module.startswith(name))
        for module in modules
        for name in _MODULES
    )


def _fields(number: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(") ")[2].split()


def _command(number: int) -> list[str]:
    try:
        text = Path(f"/proc/{number}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rstrip("\0").split("\0")
