"""The loader's worker processes: what they obey, and how often they may be started again.

Owns the signals around them. When a worker dies, torch raises an error in the main thread wherever that
stands, also in the middle of an update; here a death is heard only while the loader waits for a batch, and
found there if it came before. The loader starts the workers and goes on where they were.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch

Begun = TypeVar("Begun")
RESTARTS_IN_A_ROW, RESTARTS_IN_ALL = 3, 20
"""Without a micro-batch in between, and of one loader, which lasts for a phase."""


@dataclass(slots=True, kw_only=True)
class Restarts:
    """Counts the starts after deaths of workers.

    Attributes:
        in_a_row: Since the last micro-batch.
        in_all: Of the loader.
    """

    in_a_row: int = 0
    in_all: int = 0

    def may_begin(self) -> bool:
        """Returns whether the workers may be started once more, and counts it if so."""
        if self.in_a_row >= RESTARTS_IN_A_ROW or self.in_all >= RESTARTS_IN_ALL:
            return False
        self.in_a_row += 1
        self.in_all += 1
        return True


class Workers:
    """The processes that a `DataLoader` has started, as far as the operating system knows them.

    While they run, the death of a child process raises torch's error in `heard` alone. Outside the main
    thread torch sets no handler, and nothing is changed.
    """

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._is_open = False

    def start(self, begin: Callable[[], Begun]) -> Begun:
        """Returns `begin()`, whose processes these are from now on."""
        if not self._is_open and threading.current_thread() is threading.main_thread():
            self._is_open = True
            _CHILDREN.loaders += 1
        before = set(multiprocessing.active_children())
        begun = begin()
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        if self._is_open:
            _take_over()  # not before: torch's first loader of a process has set its own handler now
        return begun

    @contextmanager
    def heard(self) -> Iterator[None]:
        """A block in which a death may raise an error at any place."""
        _CHILDREN.heard += 1
        try:
            yield
        finally:
            _CHILDREN.heard -= 1

    def dead(self) -> str | None:
        """Returns how a worker has ended, in words; None while all live."""
        for process in self._processes:
            if not process.is_alive():
                return f"worker {process.pid} ended with exit code {process.exitcode}"
        return None

    def are_there(self) -> bool:
        """Returns whether a process has not ended."""
        return any(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """Ends the processes at once, also those that are stopped or read what never comes."""
        for process in self._processes:
            process.kill()

    def end(self) -> None:
        """Gives the deaths of children back their meaning. Idempotent."""
        if self._is_open:
            self._is_open = False
            _CHILDREN.loaders -= 1


def start_worker(_worker: int) -> None:
    """Prepares a worker; `DataLoader` calls it first in each."""
    # What the parent has left as garbage may hold threads, as a frame that PyAV has converted does (18.1.0:
    # swscale's slices). A fork has none of them, and to free such a thing here would wait for them forever.
    gc.freeze()
    torch.set_num_threads(1)  # the workers are the threads, as many as cores are to be used
    # Ctrl-C reaches the whole process group; the training process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So do the signals that make it save, which needs the batches of the update under way; only its own
    # SIGTERM ends a worker. A handler in Python cannot tell who sent it, `sigwaitinfo` can.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_SECONDS = 2.0


def _obey_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # else it is gone, and a clip that blocks would keep this process for good
        received = signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            break
    os._exit(0)


@dataclass(slots=True)
class _Children:
    """What SIGCHLD means in this process, which has one handler for all loaders.

    Attributes:
        loaders: How many have workers.
        heard: How many wait for a batch.
        handler: What was set before, usually torch's.
        is_called: Whether that runs; it may call what was set before it, and so this one again.
    """

    loaders: int = 0
    heard: int = 0
    handler: Any = None
    is_called: bool = False


_CHILDREN = _Children()


def _take_over() -> None:
    current = signal.getsignal(signal.SIGCHLD)
    if current is not _on_child:
        _CHILDREN.handler = current
        signal.signal(signal.SIGCHLD, _on_child)


def _on_child(number: int, frame: FrameType | None) -> None:
    is_heard = _CHILDREN.heard > 0 or _CHILDREN.loaders == 0
    if not is_heard or _CHILDREN.is_called or not callable(_CHILDREN.handler):
        return
    _CHILDREN.is_called = True
    try:
        _CHILDREN.handler(number, frame)
    finally:
        _CHILDREN.is_called = False
