"""Whether the other ranks are alive, and why this one cannot go on if they are not.

A rank that dies while others wait for it in a collective shows there as a closed connection, as a time-out
much later, or, if its host vanished from the network, not at all. So every rank shows a beat in the group's
own store and looks at the others'. Owns the beats, the verdict and the end of this process; `dist` starts and
stops it.

One thread talks to the store and may be held up by a dead network; another one judges. Neither uses
collectives.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as torch_dist

_LOG = logging.getLogger(__name__)
LOST_CODE = 1
_PREFIX = "aiprod_ds/peers"
_VERDICT = f"{_PREFIX}/verdict"
_LOOK_SECONDS = 0.25
_SILENT_BEATS = 3  # two and the slowness of a busy machine
_PATIENCE_BEATS = 8  # reached only where the store of this process itself does not answer
_GRACE_AFTER_LOSS_SECONDS = (
    5.0  # for the verdict to be read by the others, and for the main thread to end by itself
)
_GRACE_AFTER_FAILURE_SECONDS = (
    60.0  # the main thread may be writing the report of an error that all ranks have
)


class PeerWatch:
    """Two threads that end this process if another rank has been silent for too long or has failed.

    Args:
        rank: Of this process.
        world_size: More than 1.
        address: Host of the group's store, which lives in rank 0.
        port: Its port.
        limit_seconds: Silence after which a rank counts as lost.

    Attributes:
        before_end: Called before this process ends.
    """

    def __init__(self, *, rank: int, world_size: int, address: str, port: int, limit_seconds: float) -> None:
        self._rank, self._world_size, self._limit = rank, world_size, limit_seconds
        self._beat_seconds = min(
            max(2.0, world_size / 32), limit_seconds / 6
        )  # every rank reads all: n^2 reads a beat
        self._timeout = timedelta(seconds=limit_seconds)
        self._store: Any = torch_dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's export list
            address, port, None, False, timeout=self._timeout, wait_for_workers=False
        )
        self._own_host = socket.gethostname()
        self._hosts: list[str] = []
        self._beats = [b""] * world_size
        self._changed_at: list[float] = []
        self._contact_at = time.monotonic()
        self._store_is_lost = False
        self._verdict: str | None = None
        self._to_post: str | None = None
        self._is_posted = threading.Event()
        self._stopped = threading.Event()
        self.before_end: Callable[[], None] | None = None
        self._threads = [
            threading.Thread(target=work, name=f"peers_{work.__name__.strip('_')}", daemon=True)
            for work in (self._talk, self._judge)
        ]

    def start(self) -> None:
        """Begins to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the watch; no thread of it is inside torch when this returns, unless the network holds it
        up."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=self._beat_seconds + 5.0)

    def tell(self, failure: str) -> None:
        """Tells the other ranks that this one fails and why, and waits until they can have read it."""
        self._to_post = f"rank {self._rank} on {self._own_host} failed: {failure}"
        self._is_posted.wait(2 * self._beat_seconds)
        if self._rank == 0:  # the store ends with this process
            self._stopped.wait(1.5 * self._beat_seconds)

    def blame(self) -> str | None:
        """Returns which other rank is to blame for a collective that just failed here; None if all are well.

        A rank that just died seems alive for some time: its last beat may be read a whole beat late, and
        between two of a living rank two may pass. So this waits until a rank has been silent for longer than
        a living one is, or every rank has shown two new beats, of which it must have sent the second after
        the call.
        """
        before, deadline = self._counts(), time.monotonic() + _PATIENCE_BEATS * self._beat_seconds
        while self._verdict is None and time.monotonic() < deadline:
            silent = self._silent(_SILENT_BEATS * self._beat_seconds)
            if silent is not None:
                self._to_post = silent
                self._is_posted.wait(self._beat_seconds)
                return silent
            if all(now >= then + 2 for then, now in zip(before, self._counts(), strict=True)):
                break
            time.sleep(_LOOK_SECONDS)
        return self._verdict

    def _counts(self) -> list[int]:
        return [int(beat or b"0") for beat in self._beats]

    def _talk(self) -> None:
        beat, keys = 0, [f"{_PREFIX}/beat/{rank}" for rank in range(self._world_size)]
        hosts = [f"{_PREFIX}/host/{rank}" for rank in range(self._world_size)]
        try:
            self._store.set(hosts[self._rank], self._own_host)
            self._store.set(keys[self._rank], "0")
            self._store.wait([*hosts, *keys], self._timeout)
            self._hosts = [host.decode() for host in self._store.multi_get(hosts)]
            while not self._stopped.is_set():
                beat += 1
                self._store.set(keys[self._rank], str(beat))
                self._note(self._store.multi_get(keys))
                if self._to_post is not None:
                    self._store.compare_set(_VERDICT, "", self._to_post)
                    self._is_posted.set()
                if self._store.check([_VERDICT]):
                    self._verdict = self._store.get(_VERDICT).decode()
                self._stopped.wait(
                    self._beat_seconds if self._to_post is None or self._is_posted.is_set() else 0.0
                )
        except RuntimeError:  # DistNetworkError, DistStoreError: rank 0, which holds the store, is gone
            self._store_is_lost = not self._stopped.is_set()

    def _note(self, beats: list[bytes]) -> None:
        now = time.monotonic()
        if not self._changed_at:
            self._changed_at = [now] * self._world_size
        for rank, beat in enumerate(beats):
            if beat != self._beats[rank]:
                self._changed_at[rank] = now
        self._beats, self._contact_at = beats, now

    def _judge(self) -> None:
        looked_at = time.monotonic()
        while not self._stopped.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if (
                now - looked_at > 20 * _LOOK_SECONDS
            ):  # this process was itself stopped; silence during that time says nothing
                self._contact_at = now
                self._changed_at = [now] * len(self._changed_at)
            looked_at = now
            silent = self._silent(self._limit)
            if self._verdict is not None:
                self._end(self._verdict, _GRACE_AFTER_FAILURE_SECONDS)
            elif silent is not None:
                self._to_post = silent
                self._end(silent, _GRACE_AFTER_LOSS_SECONDS)

    def _silent(self, seconds: float) -> str | None:
        """Returns who has been silent for that long, in words; None if nobody has."""
        now = time.monotonic()
        if self._store_is_lost or now - self._contact_at > seconds:
            if self._rank == 0:
                return None  # the store is in this process: it is only slow
            where = f" on {self._hosts[0]}" if self._hosts else ""
            return f"rank 0{where} is gone: it cannot be reached from {self._own_host}"
        silent = [
            rank
            for rank, changed_at in enumerate(self._changed_at)
            if now - changed_at > seconds and rank != self._rank
        ]
        if not silent:
            return None
        listed = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in silent[:4])
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        oldest = max(now - self._changed_at[rank] for rank in silent)
        return f"{listed}{more} {'is' if len(silent) == 1 else 'are'} gone: nothing heard for {oldest:.0f} s"

    def _end(self, verdict: str, grace_seconds: float) -> None:
        _LOG.error(
            "peer_lost rank=%d host=%s reason=%s; ending within_seconds=%.0f",
            self._rank,
            self._own_host,
            verdict,
            grace_seconds,
        )
        if self.before_end is not None:
            self.before_end()
        if not self._stopped.wait(grace_seconds):
            os._exit(LOST_CODE)  # the main thread waits in a collective that nothing interrupts
