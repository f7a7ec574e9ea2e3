"""The process-group helpers on two ranks, launched and forked, and what `run_on_ranks` does with failures of
both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.dist import run_on_ranks

LAUNCHER = pytest.mark.parametrize("launcher", [False, True], ids=["forked", "launched"])

pytestmark = pytest.mark.dist


def use_every_helper(offset: float) -> dict[str, Any]:
    rank = dist.rank()
    dist.barrier()
    return {
        "rank": rank,
        "world_size": dist.world_size(),
        "is_main": dist.is_main(),
        "mean": dist.reduce_mean(torch.tensor([rank + offset, 2.0])).tolist(),
        "broadcast": dist.broadcast_object({"rank": rank}),
        "gathered": dist.gather_objects(rank * 10),
        "agree": [dist.all_agree(True), dist.all_agree(rank == 0)],
    }


def fail_on_rank_1() -> None:
    if dist.rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def hang(folder: str) -> None:
    """Leaves its process's number and that of a process that it has started."""
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, str(dist.rank())).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)


def look_around() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "parent": os.getppid(),
        "parent_says": Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8"),
        "folder": str(Path.cwd()),
        "here": sys.path[0],
        "variable": os.environ.get("SET_BETWEEN_CALLS"),
        "threads": torch.get_num_threads(),
        "accelerator": os.environ["DS_ACCELERATOR"],
        "input": sys.stdin.read(),
        "group": os.getpgid(0) == os.getpid(),
    }


@LAUNCHER
def test_every_helper_agrees_on_two_ranks(*, launcher: bool) -> None:
    results = run_on_ranks(use_every_helper, ranks=2, arguments={"offset": 1.0}, launcher=launcher)
    common = {
        "world_size": 2,
        "mean": [1.5, 2.0],
        "broadcast": {"rank": 0},
        "gathered": [0, 10],
        "agree": [True, False],
    }
    assert results == [{"rank": 0, "is_main": True, **common}, {"rank": 1, "is_main": False, **common}]


@LAUNCHER
def test_a_failing_rank_is_an_error_that_shows_its_output(*, launcher: bool) -> None:
    with pytest.raises(EngineError, match=r"(?s)no result of ranks \[0, 1\].*rank 1 has had enough"):
        run_on_ranks(fail_on_rank_1, ranks=2, timeout_seconds=120, launcher=launcher)


def test_a_dead_rank_ends_the_others_at_once() -> None:
    with pytest.raises(EngineError, match=r"exited with \[-9, -9\] and no result of ranks \[0, 1\]"):
        run_on_ranks(die_on_rank_1, ranks=2, timeout_seconds=120)


@LAUNCHER
def test_a_hanging_rank_is_killed_after_the_time_limit(tmp_path: Path, *, launcher: bool) -> None:
    seconds = 15.0 if launcher else 4.0
    while len(_started(tmp_path)) < 4:  # a busy machine starts ranks more slowly
        with pytest.raises(EngineError, match="ran out of time"):
            run_on_ranks(
                hang, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=seconds, launcher=launcher
            )
        seconds *= 2
    _await(lambda: not any(map(_is_alive, _started(tmp_path))))  # a signal is delivered, not waited for


def test_calls_share_a_process_that_has_imported_and_get_what_the_caller_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_on_ranks(look_around, ranks=2)
    monkeypatch.setenv("SET_BETWEEN_CALLS", "yes")
    monkeypatch.chdir(tmp_path)
    second = run_on_ranks(look_around, ranks=1)
    assert {rank["parent"] for rank in [*first, *second]} == {first[0]["parent"]}
    assert len({rank["process"] for rank in [*first, *second]}) == 3
    assert "fork_server" in first[0]["parent_says"]
    assert [rank["variable"] for rank in [*first, *second]] == [None, None, "yes"]
    assert second[0]["folder"] == second[0]["here"] == str(tmp_path)
    for rank in [*first, *second]:
        assert (rank["threads"], rank["accelerator"], rank["input"], rank["group"]) == (1, "cpu", "", True)


def test_ranks_with_an_environment_of_their_own_are_launched() -> None:
    ranks = run_on_ranks(look_around, ranks=1, environment={"OMP_NUM_THREADS": "2"})
    assert "deepspeed" in ranks[0]["parent_says"]
    assert ranks[0]["threads"] == 2


def test_a_call_after_one_that_was_given_up_gets_its_own_answer(tmp_path: Path) -> None:
    def give_up(*_: Any) -> None:
        raise InterruptedError

    def interrupt() -> None:
        _await(lambda: len(_started(tmp_path)) == 4)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, give_up)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(InterruptedError):
            run_on_ranks(hang, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=120)
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
    assert not any(map(_is_alive, _started(tmp_path)))
    assert [rank["variable"] for rank in run_on_ranks(look_around, ranks=1)] == [None]


def test_nothing_outlives_the_caller(tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_engine_dist as t\n"
    script += "t.run_on_ranks(t.hang, ranks=2, arguments={'folder': sys.argv[2]})"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command) as caller:
        _await(lambda: len(_started(tmp_path)) == 4)
        server = Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text(encoding="utf-8").split()
        assert len(server) == 1
        caller.kill()
    _await(lambda: not any(map(_is_alive, [*server, *_started(tmp_path)])))


def _started(folder: Path) -> list[str]:
    return [pid for path in folder.iterdir() for pid in path.read_text(encoding="utf-8").split()]


def _is_alive(pid: str) -> bool:
    """A killed process whose parent has not asked for it yet is a zombie, not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
