"""SIGTERM and SIGUSR1 as a request to this process, in place of its end; the second one ends it at once.

Owns the handlers while it is open. What a request means, and that all ranks act on it together, is `requests.py`.

Python runs signal handlers between two of its own instructions, so one would wait for as long as the main thread waits in a
collective. The C part of Python's handler also writes the signal's number to a file descriptor at once; a thread reads it here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

from typing_extensions import Self

_LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A signal to the process group reaches the ranks once more through the launcher, whose handler sends SIGTERM to each of them.
ONE_REQUEST_SECONDS = 3.0


class SignalWatch:
    """A context in which the first signal is noted and one that comes over 3 s later exits with 128 + its number.

    Outside the main thread, where Python sets no handlers, signals keep their meaning and `received` stays None.

    Attributes:
        received: The signal that was noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, _leave_to_thread)
            signal.siginterrupt(number, False)  # system calls of libraries go on
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, args=(reader,), name="signal_watch", daemon=True)
        self._thread.start()
        # A forked process, as a worker of the loader is, would write the numbers of its own signals into this descriptor.
        os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            self._restore()
            self._thread.join()

    def _restore(self) -> None:
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._writer.close()

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._meet(signal.Signals(number))

    def _meet(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
            _LOG.warning("signal_received name=%s; saving at the end of the update, once more leaves at once", number.name)
        elif now - self._received_at > ONE_REQUEST_SECONDS:
            os._exit(128 + number)


def _leave_to_thread(_number: int, _frame: FrameType | None) -> None:
    """Keeps the signal from ending the process."""
