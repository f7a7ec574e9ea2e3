"""The watch over the other ranks: who is alive, who is to blame, and the end of a process that waits for the
dead."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as torch_dist

from aiprod_ds.engine.peers import _PREFIX, LOST_CODE, PeerWatch
from aiprod_ds.testing.processes import free_port

# a beat is a sixth; the watch ends this process only after the limit and a grace, so tests are done by then
LIMIT_SECONDS = 6.0


@pytest.fixture
def store() -> Any:
    """The group's own, as rank 0 holds it."""
    return torch_dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in torch's export list
        "127.0.0.1", free_port(), None, True, timeout=timedelta(seconds=30), wait_for_workers=False
    )


def _watch(store: Any, *, rank: int, world_size: int) -> PeerWatch:
    return PeerWatch(
        rank=rank, world_size=world_size, address="127.0.0.1", port=store.port, limit_seconds=LIMIT_SECONDS
    )


@pytest.fixture
def watches(store: Any) -> Iterator[list[PeerWatch]]:
    made = [_watch(store, rank=rank, world_size=3) for rank in range(3)]
    for watch in made:
        watch.start()
    yield made
    for watch in made:
        watch.stop()


@pytest.mark.slow
def test_nobody_is_blamed_while_all_are_well(watches: list[PeerWatch]) -> None:
    assert watches[2].blame() is None


@pytest.mark.slow
def test_a_rank_that_fell_silent_is_named_with_its_host(watches: list[PeerWatch]) -> None:
    watches[1].blame()  # long enough for all to have heard of each other
    watches[1].stop()
    verdicts = [watch.blame() or "" for watch in (watches[2], watches[0])]
    assert {verdict.rpartition(" for ")[0] for verdict in verdicts} == {
        f"rank 1 on {socket.gethostname()} is gone: nothing heard"
    }


@pytest.mark.slow
def test_a_rank_whose_last_beat_is_read_late_is_named(store: Any) -> None:
    """A rank dies right after a beat, and the other, which has just read the beats, finds out at once by its
    collective."""
    for name, value in {"host/1": "far", "beat/1": "0"}.items():
        store.set(f"{_PREFIX}/{name}", value)
    own = _watch(store, rank=0, world_size=2)
    own.start()
    try:
        for beat in (1, 2):
            _await_change(lambda: store.get(f"{_PREFIX}/beat/0"))
            time.sleep(0.1)
            store.set(f"{_PREFIX}/beat/1", str(beat))
        assert (own.blame() or "").startswith("rank 1 on far is gone: nothing heard")
    finally:
        own.stop()


def _await_change(read: Callable[[], bytes]) -> None:
    before = read()
    while read() == before:
        time.sleep(0.001)


@pytest.mark.slow
def test_a_rank_that_fails_tells_why(watches: list[PeerWatch]) -> None:
    watches[2].tell("ValueError: no more")
    assert watches[0].blame() == f"rank 2 on {socket.gethostname()} failed: ValueError: no more"


WAITING = """\
import logging, sys, time
from datetime import timedelta
import torch.distributed as torch_dist
from aiprod_ds.engine.peers import PeerWatch
logging.basicConfig(format="%(message)s")
port = int(sys.argv[1])
store = torch_dist.TCPStore("127.0.0.1", port, None, True, timeout=timedelta(seconds=30), wait_for_workers=False)
own, other = (PeerWatch(rank=rank, world_size=2, address="127.0.0.1", port=port, limit_seconds=1.2) for rank in (0, 1))
own.start()
other.start()
other.blame()
other.stop()
time.sleep(120)
"""  # noqa: E501


@pytest.mark.slow
def test_a_process_that_waits_for_a_lost_rank_ends_with_a_message() -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", WAITING, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == LOST_CODE, done.stderr
    assert (
        f"peer_lost rank=0 host={socket.gethostname()} reason=rank 1 on {socket.gethostname()} is gone"
        in done.stderr
    )
    assert time.monotonic() - began < 100
