"""The process-group helpers on two ranks, launched and forked, and what `run_on_ranks` does with failures of
both; `run_forked`, whose process forks ranks of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.engine import dist
from aiprod_ds.errors import EngineError
from aiprod_ds.testing.dist import run_forked, run_on_ranks
from aiprod_ds.testing.forked import fork_ranks, wait_for_ranks

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
        "threads": torch.get_num_threads(),
        "is_launched": "deepspeed.launcher" in _said_by_the_parent(),
    }


def _said_by_the_parent() -> str:
    return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8")


def fail_on_rank_1(folder: str) -> None:
    _meet(folder)
    if dist.rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def die_on_rank_1(folder: str) -> None:
    _meet(folder)
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def _meet(folder: str) -> None:
    """Waits through files until all ranks are here: a rank that goes while another still connects to it would
    make that one fail too, by an error of gloo's."""
    Path(folder, f"{dist.rank()}.here").touch()
    while len(list(Path(folder).glob("*.here"))) < dist.world_size():
        time.sleep(0.01)


def hang(folder: str) -> None:
    """Leaves its process's number and that of a process that it has started."""
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, str(dist.rank())).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)


def fork_two_ranks(folder: str) -> list[int]:
    def leave_a_mark() -> int:
        with dist.process_group():
            Path(folder, f"{dist.rank()} of {dist.world_size()}").touch()
        return 0

    return wait_for_ranks(fork_ranks(leave_a_mark, ranks=2))


def count() -> int:
    return dist.world_size()


def be_a_caller(folder: str) -> None:
    """Is interrupted in a call, makes another and waits for its own end in a third."""

    def give_up(*_: Any) -> None:
        raise InterruptedError

    signal.signal(signal.SIGUSR1, give_up)
    with pytest.raises(InterruptedError):
        run_on_ranks(hang, ranks=2, arguments={"folder": f"{folder}/given_up"})
    (Path(folder) / "part").write_text(str(run_on_ranks(count, ranks=1)), encoding="utf-8")
    (Path(folder) / "part").rename(Path(folder) / "answer")
    run_on_ranks(hang, ranks=2, arguments={"folder": f"{folder}/last"})


def look_around() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "parent": os.getppid(),
        "parent_says": _said_by_the_parent(),
        "folder": str(Path.cwd()),
        "here": sys.path[0],
        "variable": os.environ.get("SET_BETWEEN_CALLS"),
        "threads": torch.get_num_threads(),
        "accelerator": os.environ["DS_ACCELERATOR"],
        "input": sys.stdin.read(),
        "group": os.getpgid(0) == os.getpid(),
        "rank": os.environ.get("RANK"),
    }


@LAUNCHER
def test_every_helper_agrees_on_two_ranks(*, launcher: bool) -> None:
    """Ranks with an environment of their own are launched."""
    environment = {"OMP_NUM_THREADS": "2"} if launcher else None
    results = run_on_ranks(use_every_helper, ranks=2, arguments={"offset": 1.0}, environment=environment)
    common = {
        "world_size": 2,
        "mean": [1.5, 2.0],
        "broadcast": {"rank": 0},
        "gathered": [0, 10],
        "agree": [True, False],
        "threads": 2 if launcher else 1,
        "is_launched": launcher,
    }
    assert results == [{"rank": 0, "is_main": True, **common}, {"rank": 1, "is_main": False, **common}]


@LAUNCHER
def test_a_failing_rank_is_an_error_that_shows_its_output(tmp_path: Path, *, launcher: bool) -> None:
    arguments = {"folder": str(tmp_path)}
    with pytest.raises(EngineError, match=r"(?s)no result of ranks \[0, 1\].*rank 1 has had enough"):
        run_on_ranks(fail_on_rank_1, ranks=2, arguments=arguments, timeout_seconds=120, launcher=launcher)


def test_a_dead_rank_ends_the_others_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"exited with \[-9, -9\] and no result of ranks \[0, 1\]"):
        run_on_ranks(die_on_rank_1, ranks=2, arguments={"folder": str(tmp_path)}, timeout_seconds=120)


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


def test_a_process_that_is_no_rank_may_fork_some(tmp_path: Path) -> None:
    rank = run_on_ranks(look_around, ranks=1)[0]
    alone = run_forked(look_around)
    assert alone == {**rank, "process": alone["process"], "rank": None}
    assert run_forked(fork_two_ranks, arguments={"folder": str(tmp_path)}) == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 2", "1 of 2"]


def test_a_process_that_is_no_rank_ends_with_all_that_it_has_forked(tmp_path: Path) -> None:
    seconds = 2.0
    while len(_started(tmp_path)) < 2:  # a busy machine starts them more slowly
        with pytest.raises(EngineError, match="ran out of time"):
            run_forked(hang, arguments={"folder": str(tmp_path)}, timeout_seconds=seconds)
        seconds *= 2
    _await(lambda: not any(map(_is_alive, _started(tmp_path))))
    with pytest.raises(EngineError, match=r"(?s)exited with \[1\].*FileNotFoundError"):
        run_forked(hang, arguments={"folder": str(tmp_path / "none")})


def test_a_caller_may_give_a_call_up_and_make_another_and_nothing_outlives_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("given_up", "last")]
    script = "import sys, test_engine_dist; test_engine_dist.be_a_caller(sys.argv[1])"
    for folder in folders:
        folder.mkdir()
    # what stands beside the file that is run can be imported
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent) as caller:
        _await(lambda: len(_started(folders[0])) == 4)
        caller.send_signal(signal.SIGUSR1)
        _await((tmp_path / "answer").exists)
        assert (tmp_path / "answer").read_text(encoding="utf-8") == "[1]", (
            "not what was left of the first call"
        )
        assert not any(map(_is_alive, _started(folders[0])))
        _await(lambda: len(_started(folders[1])) == 4)
        (server,) = Path(f"/proc/{caller.pid}/task/{caller.pid}/children").read_text(encoding="utf-8").split()
        caller.kill()
    _await(lambda: not any(map(_is_alive, [server, *_started(folders[1])])))


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
