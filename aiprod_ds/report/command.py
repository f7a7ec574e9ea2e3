"""The command that started a run, as someone typed it: what starts all ranks, not what one of them got.

A launcher gives every rank a command of its own, which alone would train on one rank. So what was typed is
told by the one who knows: our launchers, in a variable; else the launcher is found among the processes that
this one descends from.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

VARIABLE = "AIPROD_DS_COMMAND"
"""What was typed, percent-encoded as far as a shell on its way would act on it."""

_LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "srun", "mpirun", "mpiexec"}
_MODULES = {"deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch"}
_LOCAL_RANK = re.compile(r"--local[_-]rank(=.*)?")
_MAX_ANCESTORS = 12
# Of shells, pdsh and files of variables; a comma, a brace or a star is nothing to them between quotes.
_SAFE = " !#&'()*+,-./:;<=>?@[]^_{|}~"


def typed_command(argv: Sequence[str]) -> str:
    """Returns the command line of this process as one would type it, without what a launcher added."""
    arguments = [argument for argument in argv[1:] if not _LOCAL_RANK.fullmatch(argument)]
    program = (
        [Path(sys.executable).name, "-m", "aiprod_ds"]
        if argv[0].endswith("__main__.py")
        else [Path(argv[0]).name]
    )
    return shlex.join([*program, *arguments])


def encoded(command: str) -> str:
    """Returns the value of `VARIABLE` for a command."""
    return quote(command, safe=_SAFE)


def starting_command(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the command that started all ranks of this run, as far as it can be known.

    Args:
        environment: Of this process.
    """
    if environment.get(VARIABLE):
        return unquote(environment[VARIABLE])
    own = typed_command(sys.argv)
    if "RANK" not in environment:
        return own
    return next(filter(None, reversed([launcher_command(line) for line in _ancestors()])), own)


def launcher_command(line: Sequence[str]) -> str:
    """Returns the command of a process as one would type it, if it is a launcher; else nothing.

    Args:
        line: Its arguments, the program first: `python /bin/deepspeed --num_gpus 2 ...`.
    """
    for place, argument in enumerate(line[:3]):
        if Path(argument).name in _LAUNCHERS:
            return shlex.join([Path(argument).name, *line[place + 1 :]])
        if argument == "-m" and line[place + 1 : place + 2] and line[place + 1] in _MODULES:
            return shlex.join([Path(line[0]).name, *line[place:]])
    return ""


def ranks_of(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Returns `ranks` and `hosts` as the launcher has told this rank; one each without a launcher."""
    ranks = _whole(environment.get("WORLD_SIZE")) or 1
    on_host = _whole(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE"))
    hosts = _whole(environment.get("CROSS_SIZE")) or (-(-ranks // on_host) if on_host else 1)
    return {"ranks": ranks, "hosts": hosts}


def _ancestors() -> Iterator[list[str]]:
    """Yields the arguments of the processes that this one descends from, its parent first; none where the
    system does not tell (no /proc)."""
    process = os.getppid()
    for _ in range(_MAX_ANCESTORS):
        folder = Path("/proc") / str(process)
        try:
            line = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            status = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            process = int(status.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        yield line[:-1]
        if process <= 1:
            return


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
