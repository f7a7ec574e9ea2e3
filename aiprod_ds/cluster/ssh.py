"""One command on many hosts at the same time, through ssh: with time-outs, without questions, without another
shell's surprises.

Owns the ssh command line and the answers. Called by the launcher and the doctor.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_CONNECT_SECONDS = 10
_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ssh:
    """How to reach the hosts.

    Attributes:
        port: None leaves it to ssh's configuration.
        config: A file in place of ~/.ssh/config.
    """

    port: int | None = None
    config: Path | None = None

    @property
    def options(self) -> list[str]:
        """Options of `ssh` for every call: no questions, an end for a silent connection after a minute."""
        options = [] if self.config is None else ["-F", str(self.config.resolve())]
        options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
        options += ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        return options if self.port is None else [*options, "-p", str(self.port)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a host said.

    Attributes:
        code: Exit code of the command; 255 if ssh itself failed, None if time ran out.
        ended_at: Unix time at which the answer was whole.
    """

    host: str
    code: int | None
    output: str
    errors: str
    began_at: float
    ended_at: float

    @property
    def reason(self) -> str:
        """The last line of what went wrong, in words."""
        if self.code is None:
            return f"no answer within {self.ended_at - self.began_at:.0f} s"
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self.code}"


def ask_all(
    hosts: Sequence[str],
    ssh: Ssh,
    command: Callable[[int], Sequence[str]],
    *,
    timeout_seconds: float,
    shell: str = "",
) -> list[Answer]:
    """Runs a command on every host at the same time and returns the answers in the order of `hosts`.

    Args:
        hosts: Names that ssh takes; at most 64 are asked at once.
        ssh: Options of every call.
        command: The arguments for the host with this index; they reach the program as they are.
        timeout_seconds: For each host, connecting included. What runs there then loses its connection.
        shell: What the shell there does first, e.g. `cd FOLDER && `; quoted by the caller.
    """

    def ask(index: int) -> Answer:
        remote = shell + shlex.join(command(index))
        return _run(hosts[index], ["ssh", *ssh.options, hosts[index], remote], timeout_seconds)

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as executor:
        return list(executor.map(ask, range(len(hosts))))


def ask_here(command: Sequence[str], *, timeout_seconds: float, environment: Mapping[str, str]) -> Answer:
    """Runs a command on this machine and returns its answer in the same form, under the name `localhost`."""
    return _run("localhost", list(command), timeout_seconds, environment)


def _run(
    host: str, command: list[str], timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> Answer:
    began = time.time()
    code: int | None
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_seconds,
            check=False,
            env=None if environment is None else dict(environment),
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, output, errors = None, _text(error.stdout), _text(error.stderr)
    except FileNotFoundError:
        code, output, errors = 127, "", f"{command[0]} is not installed here"
    return Answer(host=host, code=code, output=output, errors=errors, began_at=began, ended_at=time.time())


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
