"""Starting and ending processes of tests: the launcher's command, a free port, a session that leaves nothing
behind.

Knows nothing of what the processes do. Called by the rest of this package and by tests that start commands.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping


def launcher_command(*, ranks: int) -> list[str]:
    """Returns the command that starts `ranks` processes on this machine; what they execute is to be added to
    it."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,
        "--num_accelerators",
        str(ranks),
    ]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--no_local_rank"]


def run_in_own_session(
    command: list[str], *, timeout_seconds: float, environment: Mapping[str, str]
) -> tuple[int | None, str]:
    """Runs a command in a session of its own and leaves none of its processes behind.

    Returns:
        The exit code, None after the time limit, and the output of all its processes.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_session(process.pid)
            process.wait()
        output.seek(0)
        return code, output.read()


def kill_session(leader: int) -> None:
    """Kills every process of the group that `leader` leads; the launcher leaves its workers behind when it
    dies itself."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """Returns a TCP port on this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
