"""One run on several hosts: everything is checked, then one deepspeed command is started, watched and judged.

Owns the order: options, files, configuration, hosts, command, end. With `node_rank` it starts this host's
part only and another instance does the same on every other host. Called by the command line.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from aiprod_ds.cluster.capacity import require_capacity_of
from aiprod_ds.cluster.command import (
    DEFAULT_PORT,
    Launch,
    check_arguments,
    check_paths,
    deepspeed_command,
    is_plain,
    rank_pattern,
)
from aiprod_ds.cluster.completion import Report
from aiprod_ds.cluster.environment import (
    default_environment_files,
    exported,
    read_environment,
    render_for_pdsh,
)
from aiprod_ds.cluster.examine import Examined, Examiner, address_of
from aiprod_ds.cluster.findings import Level, judge
from aiprod_ds.cluster.hostfile import Host, num_ranks, read_hostfile, select_hosts
from aiprod_ds.cluster.ssh import Ssh
from aiprod_ds.cluster.supervise import Supervisor
from aiprod_ds.config.load import load_config
from aiprod_ds.errors import AiprodError, ConfigError, EngineError
from aiprod_ds.report.command import VARIABLE, encoded, typed_command
from aiprod_ds.train.orphans import Launchers

_LOG = logging.getLogger(__name__)
_FAILED, _SAVED = 1, 75
# Of ranks that SIGTERM ended, through DeepSpeed's launcher: they were loading, or they would have saved.
_ENDED_BY_SIGTERM = 256 - signal.SIGTERM
# Done, bad configuration, saved because somebody asked for it, and gone wrong, which it would be again
# (`aiprod_ds.cli`).
_FINAL = frozenset({0, 2, 75, 78})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; attributes are the options of `aiprod-ds launch`."""

    config: Path
    run_folder: Path
    hostfile: Path
    include: str = ""
    exclude: str = ""
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    accept_changed_data: bool = False
    trust_code: bool = False
    env_file: Path | None = None
    ssh: Ssh
    no_ssh: bool = False
    node_rank: int | None = None
    master_address: str | None = None
    master_port: int | None = None
    bind_cores: bool = False
    max_restarts: int = 0
    dry_run: bool = False
    verbose: bool = False


Once = Callable[[Request, Console], tuple[int, bool]]
"""Makes one start; returns the exit code, and whether a signal asked for the end."""


def start(request: Request, console: Console, *, once: Once | None = None) -> int:
    """Runs `aiprod-ds train` on the hosts and returns its exit code.

    With `max_restarts` it starts again where the ranks failed, after examining the hosts again; from the
    newest checkpoint, if this start or the one before has made any.

    Args:
        request: What the user asked for.
        console: Shows what is started.
        once: Makes one start, in place of DeepSpeed's launcher.

    Returns:
        0 only if the run's own report says that it is completed; 75 if it was asked to stop and nothing is
        lost; else the launcher's code, or 1 if that was 0.

    Raises:
        ConfigError: If anything that was given is wrong; nothing has been started.
        EngineError: If a host is; the message has every problem.
    """
    try:
        with _leaving_for_sigterm():
            return _start_until_done(request, console, once or _start_once)
    except _StoppedError:
        _LOG.warning("stopped reason=SIGTERM while no rank was running")
        return _SAVED


def _start_until_done(request: Request, console: Console, start_once: Once) -> int:
    before = _checkpoints(request.run_folder)
    code, is_stopped = start_once(request, console)
    for restart in range(1, request.max_restarts + 1):
        if code in _FINAL or is_stopped or request.dry_run:
            break
        has_saved = bool(_checkpoints(request.run_folder) - before)
        _LOG.warning("restarting restart=%d of=%d exit_code=%d", restart, request.max_restarts, code)
        again = replace(request, resume="auto" if has_saved else request.resume)
        code, is_stopped = start_once(again, console)
    if is_stopped and code == _ENDED_BY_SIGTERM:
        _LOG.warning("stopped reason=the signal came before the ranks had begun to train")
        return _SAVED
    return code


class _StoppedError(Exception):
    """A signal came between two starts."""


@contextmanager
def _leaving_for_sigterm() -> Iterator[None]:
    """Makes SIGTERM an end like that of a run which has saved, wherever the supervisor does not mind it."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise _StoppedError

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _checkpoints(run_folder: Path) -> set[tuple[str, int]]:
    """Returns names and times of the checkpoints that are there."""
    return {
        (path.name, path.stat().st_mtime_ns) for path in (run_folder / "checkpoints").glob("update_*[0-9]")
    }


def _start_once(request: Request, console: Console) -> tuple[int, bool]:
    """Returns the exit code, and whether a signal asked for the end."""
    hosts, environment = check(request)
    selected = [host.name for host in hosts]
    launch = Launch(
        hostfile=request.hostfile,
        include=request.include,
        exclude=request.exclude,
        config=request.config,
        run_folder=request.run_folder.absolute(),  # ends up in what finds the ranks of this run and no other
        options=(
            *(part for override in request.overrides for part in ("--set", override)),
            "--resume",
            request.resume,
            *(["--accept-changed-data"] if request.accept_changed_data else []),
            *(["--trust-code"] if request.trust_code else []),
        ),
        master_address=request.master_address or hosts[0].name,
        master_port=request.master_port or DEFAULT_PORT,
        node_rank=_node_rank(request, selected) if request.no_ssh else None,
        bind_cores=request.bind_cores,
        is_verbose=request.verbose,
    )
    check_arguments(launch.arguments)
    found = _examine(request, hosts, environment, launch.node_rank)
    require_capacity_of(found, request, world_size=num_ranks(hosts))
    if launch.node_rank is None:
        first = found[0].probe or {}
        address = request.master_address or address_of(first, is_local=False)
        launch = replace(
            launch, master_address=address, master_port=request.master_port or int(first["free_port"])
        )
    elif len(hosts) == 1 and found[0].probe is not None:
        # Nobody else has to guess it, and an earlier start whose ranks still save may hold the usual one.
        launch = replace(launch, master_port=request.master_port or int(found[0].probe["free_port"]))
    command = deepspeed_command(launch)
    listed = ", ".join(f"{host.name} ({len(host.slots)})" for host in hosts)
    console.print(f"{num_ranks(hosts)} ranks on {listed}", markup=False, highlight=False)
    if request.dry_run or request.verbose:
        console.print(shlex.join(command), markup=False, highlight=False, soft_wrap=True)
    # What a rank gets would start one rank; the run's page says what was typed here.
    environment = {**environment, VARIABLE: encoded(typed_command(sys.argv))}
    environment |= Launchers.environment_of_this_process()
    return (0, False) if request.dry_run else _run(request, launch, command, environment, selected)


def check(request: Request) -> tuple[tuple[Host, ...], dict[str, str]]:
    """Returns the chosen hosts and the variables for their ranks, after checking all that can be checked
    without a host.

    Raises:
        ConfigError: With every problem of every part.
    """
    problems: list[str] = []
    hosts: tuple[Host, ...] = ()
    environment: dict[str, str] = {}
    try:
        hosts = select_hosts(
            read_hostfile(request.hostfile), include=request.include, exclude=request.exclude
        )
    except ConfigError as error:
        problems += error.problems
    try:
        environment = ranks_environment(request.env_file, for_ssh=not request.no_ssh)
    except ConfigError as error:
        problems += error.problems
    for part in (_check_config, _check_options):
        try:
            part(request)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return hosts, environment


def ranks_environment(env_file: Path | None, *, for_ssh: bool) -> dict[str, str]:
    """Returns the variables that the ranks get beyond those of a login: of this process, then of files, which
    override.

    Args:
        env_file: None: what DeepSpeed would read.
        for_ssh: Whether this process's environment does not reach the ranks by itself.

    Raises:
        ConfigError: With every problem of the files and of the values.
    """
    values = exported(os.environ) if for_ssh else {}
    problems: list[str] = []
    for path in [env_file] if env_file is not None else default_environment_files():
        try:
            values |= read_environment(path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if for_ssh:  # a checkout that is not installed is found from the working folder, as DeepSpeed has it
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), values.get("PYTHONPATH", "")]))
    return values


def _check_config(request: Request) -> None:
    load_config(request.config, request.overrides, str(request.run_folder), trust_code=request.trust_code)


def _check_options(request: Request) -> None:
    problems = []
    if not request.no_ssh:
        check_paths()
        if shutil.which("pdsh") is None:
            problems.append(
                "pdsh: must be installed on this machine, got none. On Debian: apt install pdsh; or use "
                "--no-ssh."
            )
        if request.ssh.config is not None and not is_plain(str(request.ssh.config.resolve())):
            problems.append(
                f"--ssh-config: must be a path without blanks, got {str(request.ssh.config)!r}. Move the "
                "file."
            )
        if request.bind_cores:
            problems.append(
                "--bind-cores: has no effect through pdsh, where DeepSpeed drops it. Remove it, or use "
                "--no-ssh."
            )
        if request.node_rank is not None:
            problems.append("--node-rank: has no effect without --no-ssh. Remove it, or add --no-ssh.")
    elif request.bind_cores and shutil.which("numactl") is None:
        problems.append(
            "--bind-cores: needs numactl, got none here. On Debian: apt install numactl; or leave the "
            "option out."
        )
    address = request.master_address
    if address is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.:_-]*", address) is None:
        problems.append(f"--master-addr: must be an address or a host name, got {address!r}.")
    if request.max_restarts < 0:
        problems.append(f"--max-restarts: must be 0 or more, got {request.max_restarts}.")
    if problems:
        raise ConfigError(problems)


def _node_rank(request: Request, names: Sequence[str]) -> int:
    """Returns which of the hosts this one is: as given, as Slurm says, or by its name."""
    given = request.node_rank if request.node_rank is not None else os.environ.get("SLURM_NODEID")
    if given is None:
        short = socket.gethostname().split(".")[0]
        own = [index for index, name in enumerate(names) if name.split(".")[0] == short]
        if len(own) != 1:
            raise ConfigError(
                f"--node-rank: must be given, because {short!r} is {len(own)} times in the hostfile. Count "
                "from 0."
            )
        return own[0]
    if not str(given).isdigit() or int(given) >= len(names):
        raise ConfigError(
            f"--node-rank: must be of 0 to {len(names) - 1}, one for each host, got {given}. Count from 0."
        )
    return int(given)


def _examine(
    request: Request, hosts: Sequence[Host], environment: Mapping[str, str], node_rank: int | None
) -> Sequence[Examined]:
    if node_rank is not None:
        hosts = [hosts[node_rank]]
    examiner = Examiner(hosts=hosts, ssh=None if request.no_ssh else request.ssh, environment=environment)
    found = examiner.examine(measures=False)
    errors = [str(finding) for finding in judge(found) if finding.level is Level.ERROR]
    if errors:
        raise EngineError("\n".join([*errors, "Nothing was started. `aiprod-ds doctor` shows more."]))
    return found


def _tell_of_what_was_left(run_folder: Path) -> None:
    """Writes the page of a run that was killed: it could not itself."""
    from aiprod_ds.report.page.run_page import write_page  # loads numpy and matplotlib
    from aiprod_ds.train.resume.folder_lock import is_in_use

    try:
        page = write_page(run_folder, is_running=is_in_use(run_folder))
    except (AiprodError, OSError) as error:  # it had not begun
        _LOG.info("no_page folder=%s reason=%s", run_folder, error)
    else:
        _LOG.info("page_of_what_was_left page=%s", page)


def _run(
    request: Request, launch: Launch, command: list[str], environment: Mapping[str, str], names: Sequence[str]
) -> tuple[int, bool]:
    supervisor = Supervisor(
        pattern=rank_pattern(launch), hosts=() if request.no_ssh else names, ssh=request.ssh
    )
    report = Report.of(request.run_folder)
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_launch_") as folder:
        variables = {**os.environ, **environment}
        if not request.no_ssh:
            path = Path(folder) / "environment"
            path.write_text(render_for_pdsh(environment), encoding="utf-8")
            options = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *request.ssh.options]).strip()
            variables = {**os.environ, "DS_ENV_FILE": str(path), "PDSH_SSH_ARGS_APPEND": options}
        code = supervisor.run(command, variables)
    if code != 0 and report.status() == "missing":
        _tell_of_what_was_left(request.run_folder)
    return judged(code, report), supervisor.is_stopped


def judged(code: int, report: Report) -> int:
    """Returns the exit code of a start whose launcher ended with `code`: 0 only if the run completed."""
    if code != 0 or report.is_completed():
        return code
    _LOG.error(
        "run_not_completed report=%s status=%s: the launcher ended without an error, the run did not",
        report.path,
        report.status(),
    )
    return _FAILED
