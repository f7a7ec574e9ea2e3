"""The deepspeed command of a run on several hosts, with every argument safe from the shells on its way.

pdsh joins what it gets by spaces and hands it to a shell on each host; DeepSpeed puts double quotes around
arguments with spaces and escapes nothing else in them (deepspeed 0.19.8, launcher/multinode_runner.py:73).
With `--no_ssh` no shell is involved.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiprod_ds.errors import ConfigError

DEFAULT_PORT = 29500
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start, and how.

    Attributes:
        hostfile: For DeepSpeed; checked beforehand.
        include: Hosts and slots to use, as DeepSpeed's option; empty: all.
        exclude: Hosts and slots to leave out; not beside `include`.
        config: As every host finds it.
        run_folder: `--output-dir` of the run.
        options: More arguments of `aiprod-ds train`.
        master_address: Of the first host, as all hosts reach it.
        master_port: Free there.
        node_rank: This host's index, for one launcher on each host; None starts all by pdsh.
        bind_cores: Gives every rank cores of its own; only with `node_rank`.
        is_verbose: Whether launcher and ranks log all that they can.
    """

    hostfile: Path
    include: str = ""
    exclude: str = ""
    config: Path
    run_folder: Path
    options: tuple[str, ...] = ()
    master_address: str
    master_port: int = DEFAULT_PORT
    node_rank: int | None = None
    bind_cores: bool = False
    is_verbose: bool = False

    @property
    def arguments(self) -> list[str]:
        """What every rank's `python -m aiprod_ds` gets."""
        verbose = ["--verbose"] if self.is_verbose else []
        return ["train", str(self.config), "--output-dir", str(self.run_folder), *self.options, *verbose]


def deepspeed_command(launch: Launch) -> list[str]:
    """Returns the command that starts the run (pdsh), or this host's part of it (`node_rank`).

    Raises:
        ConfigError: If an argument cannot be passed on as it is.
    """
    check_arguments(launch.arguments)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(launch.hostfile)]
    command += ["--include", launch.include] if launch.include else []
    command += ["--exclude", launch.exclude] if launch.exclude else []
    # One host that is left over by a filter would otherwise be taken for this machine; ssh has been checked
    # before.
    how = (
        ["--force_multi", "--no_ssh_check"]
        if launch.node_rank is None
        else ["--no_ssh", "--node_rank", str(launch.node_rank)]
    )
    command += [*how, "--master_addr", launch.master_address, "--master_port", str(launch.master_port)]
    command += ["--bind_cores_to_rank"] if launch.bind_cores else []
    command += ["--log_level", "info" if launch.is_verbose else "warning"]
    arguments = (
        launch.arguments
        if launch.node_rank is not None
        else [quote_for_pdsh(part) for part in launch.arguments]
    )
    return [*command, "--no_local_rank", "--module", "aiprod_ds", *arguments]


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks that arguments hold no control characters: a line break would end a command on the other hosts.

    Raises:
        ConfigError: With every argument that does.
    """
    problems = [
        f"arguments: must be text on one line, got {argument!r}. Put such values into the configuration."
        for argument in arguments
        if _CONTROL.search(argument)
    ]
    if problems:
        raise ConfigError(problems)


def check_paths() -> None:
    """Checks the two paths that DeepSpeed puts into the command unquoted: the working folder and the Python.

    Raises:
        ConfigError: If one of them holds a blank or a character that a shell would act on.
    """
    problems = [
        f"{what}: must be of letters, digits and _@+=:,./- to be started on other hosts, got {path!r}. Work "
        "from another folder."
        for what, path in (("working folder", str(Path.cwd())), ("python", sys.executable))
        if not is_plain(path)
    ]
    if problems:
        raise ConfigError(problems)


def is_plain(path: str) -> bool:
    """Returns whether a path needs no quotes anywhere."""
    return _PLAIN_PATH.fullmatch(path) is not None


def quote_for_pdsh(argument: str) -> str:
    r"""Returns `argument` as DeepSpeed's pdsh runner must get it, so that a rank gets it as it was.

    Example: `a$b` becomes `'a$b'`; `a $b` becomes `a \$b`, because DeepSpeed puts double quotes around what
    has spaces.
    """
    doubled = argument.replace("%", "%%")  # pdsh replaces %h, %n and %u
    if " " not in doubled:
        return shlex.quote(doubled)
    return re.sub(r"[\\$`]", r"\\\g<0>", doubled)


def rank_pattern(launch: Launch) -> str:
    """Returns the regular expression by which `pkill -f` finds the ranks of a run, and no launcher."""
    start = " ".join(launch.arguments[:4])
    escaped = re.sub(r"[][(){}.*+?^$|\\]", r"\\\g<0>", start)
    return (
        f"[-]m aiprod_ds {escaped}( |$)"  # [-] keeps the pattern from finding the shell that it is written in
    )
