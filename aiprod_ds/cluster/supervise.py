"""One run under the deepspeed launcher, from start to end: signals reach the ranks, and none of them outlives
the launcher.

DeepSpeed's launcher leaves its ranks running when it dies, and ends them one after another, with 30 s each,
when it is told to stop. So a signal goes to all ranks at once, which save and leave; when the launcher has
ended, ranks that are left over are ended too. Called by the command line.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from aiprod_ds.cluster.ssh import Ssh, ask_all

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 300.0  # for the ranks to save; a second signal does not wait
_LEFT_OVER_SECONDS = 30.0
_SSH_SECONDS = 60.0
_POLL_SECONDS, _LOOK_SECONDS = 0.2, 2.0


class Launcher(Protocol):
    """A process that starts ranks; it leads a session of its own, in which those on this machine are."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Returns its exit code, -n if signal n ended it; None while it runs."""

    def wait(self) -> int:
        """Returns its exit code, once it has ended."""


@dataclass(slots=True, kw_only=True)
class Supervisor:
    """Runs one launcher.

    Attributes:
        pattern: Finds the command lines of the run's ranks, for `pkill -f`.
        hosts: Where they run; empty: on this machine only.
        ssh: Options for the hosts; without effect if there are none.
    """

    pattern: str
    hosts: Sequence[str] = ()
    ssh: Ssh = field(default_factory=Ssh)
    _signals: list[int] = field(default_factory=list)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has asked for the end."""
        return bool(self._signals)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs the launcher to its end and returns its exit code, 128 + n if signal n ended it."""
        # A session of its own: a ctrl-C in the terminal reaches this process only, which knows what to do
        # with it.
        return self.follow(lambda: subprocess.Popen(command, env=dict(environment), start_new_session=True))

    def follow(self, start: Callable[[], Launcher]) -> int:
        """Does what `run` does, with the launcher that `start` returns."""
        minded = [
            number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        ]  # nohup ignores one
        handlers = {number: signal.signal(number, self._note) for number in minded}
        launcher = start()
        try:
            return self._watch(launcher)
        finally:
            if launcher.poll() is None:
                _signal_group(launcher.pid, signal.SIGKILL)
                launcher.wait()
            self._end_left_over(launcher.pid)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _watch(self, launcher: Launcher) -> int:
        deadline, look_at = float("inf"), float("inf")
        while launcher.poll() is None:
            if self._signals and deadline == float("inf"):
                deadline, look_at = time.monotonic() + STOP_SECONDS, 0.0
                _LOG.warning(
                    "stopping signal=%s saving_within_seconds=%.0f",
                    signal.Signals(self._signals[0]).name,
                    STOP_SECONDS,
                )
            if time.monotonic() > look_at:  # ranks that have not been started yet would not hear of it
                has_reached = self._signal_ranks("TERM", launcher.pid)
                look_at = float("inf") if has_reached else time.monotonic() + _LOOK_SECONDS
            if len(self._signals) > 1 or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        code = launcher.poll()
        if code is None:  # a second signal, or the ranks did not leave in time
            return 128 + self._signals[-1]
        return code if code >= 0 else 128 - code

    def _end_left_over(self, session: int) -> None:
        """Ends ranks that outlived the launcher: asks them first, because the last one may still be writing
        its report."""
        if not self._signal_ranks("TERM", session):
            return
        deadline = time.monotonic() + (_LEFT_OVER_SECONDS if len(self._signals) < 2 else 0.0)
        while time.monotonic() < deadline:
            if not self._signal_ranks("0", session):
                return
            time.sleep(_LOOK_SECONDS)
        _LOG.error(
            "killing reason=ranks_left_over hosts=%s", ",".join(self._signal_ranks("KILL", session)) or "none"
        )
        if not self.hosts:
            _signal_group(session, signal.SIGKILL)

    def _signal_ranks(self, name: str, session: int) -> list[str]:
        """Sends a signal to every rank of the run, on all hosts at once, and returns the hosts that had
        one."""
        command = ["pkill", f"-{name}", "-f", "--", self.pattern]
        if not self.hosts:
            code = subprocess.run([*command[:-2], "-s", str(session), *command[-2:]], check=False).returncode
            return ["localhost"] if code == 0 else []
        answers = ask_all(self.hosts, self.ssh, lambda _: command, timeout_seconds=_SSH_SECONDS)
        for answer in answers:
            if answer.code not in (0, 1):
                _LOG.error(
                    "ranks_not_signalled host=%s signal=%s reason=%s", answer.host, name, answer.reason
                )
        return [answer.host for answer in answers if answer.code == 0]


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return
