"""What counts as hung, which ranks are to blame, and who counts as a launcher."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aiprod_ds import progress
from aiprod_ds.metrics.stopwatch import Activity, Stopwatch
from aiprod_ds.train import orphans
from aiprod_ds.train.hang_report import RankStatus, innermost, verdict
from aiprod_ds.train.orphans import Launchers
from aiprod_ds.train.watchdog import Watchdog


class Stops:
    received: signal.Signals | None = None
    reason = ""

    def leave(self, reason: str) -> None:
        self.reason = reason


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("aiprod_ds.train.watchdog.time.monotonic", lambda: now[0])
    return now


def _watchdog(tmp_path: Path, seconds: float | None = 60.0) -> Watchdog:
    return Watchdog(tmp_path, least_seconds=seconds, stops=Stops())


def test_the_limit_is_five_times_what_the_same_has_taken(tmp_path: Path, clock: list[float]) -> None:
    watchdog = _watchdog(tmp_path)
    stopwatch = Stopwatch(on_switch=watchdog.enter)
    assert watchdog.limit() == 30 * 60, "of the start"
    stopwatch.switch(Activity.TRAIN)
    assert watchdog.limit() == 60
    for seconds in [1.0] * 98 + [20.0, 50.0]:
        clock[0] += seconds
        watchdog.beat()
    assert watchdog.limit() == 5 * 20, "the 99th of 100 values"
    stopwatch.switch(Activity.DATA_WAIT)
    assert watchdog.limit() == 60, "another activity has its own"
    for activity, multiple in (
        (Activity.EVALUATION, 10),
        (Activity.CHECKPOINT, 10),
        (Activity.TRANSITION, 30),
    ):
        stopwatch.switch(activity)
        assert watchdog.limit() == multiple * 60
    stopwatch.switch(Activity.TRAIN)
    assert watchdog.limit() == 5 * 20, "remembered"


def test_what_is_done_for_the_first_time_may_take_long(tmp_path: Path) -> None:
    watchdog = _watchdog(tmp_path)
    watchdog.enter(Activity.TRAIN)
    for shape, limit in (("a", 1800), ("b", 1800), ("a", 60)):
        watchdog.begin(shape)
        assert watchdog.limit() == limit, shape
        watchdog.beat()
        assert watchdog.limit() == 60


def test_steps_of_this_thread_count_and_those_of_others_do_not(tmp_path: Path, clock: list[float]) -> None:
    watchdog = _watchdog(tmp_path, None)
    watchdog.enter(Activity.EVALUATION)
    with progress.told_to(watchdog):
        for seconds in (200.0, 300.0):
            clock[0] += seconds
            for _ in progress.steps([0], "evaluating clip"):
                pass
        known = list(watchdog._known[Activity.EVALUATION])
        other = threading.Thread(target=lambda: list(progress.steps([0, 1], "saving")))
        other.start()
        other.join()
        with progress.working("compiling"):
            assert watchdog._working == 1
        assert watchdog._working == 0
    assert known == [200.0, 300.0]
    assert list(watchdog._known[Activity.EVALUATION])[2:] == [0.0, 0.0], "of the block that worked"


def test_a_healthy_run_is_left_alone_and_leaves_nothing(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGRTMIN + 3)
    with _watchdog(tmp_path, 0.4) as watchdog:
        watchdog.enter(Activity.TRAIN)
        for _ in range(10):
            time.sleep(0.06)
            watchdog.beat()
        assert watchdog.await_data(lambda: 7) == 7
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGRTMIN + 3) is handler
    assert not [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]


def _status(rank: int, *, is_waiting: bool, **changes: Any) -> RankStatus:
    values = {
        "host": f"node-{rank}",
        "update": 7,
        "activity": "train",
        "seconds": 61.2,
        "where": "a.py:1 in f",
    }
    return RankStatus(rank=rank, is_waiting=is_waiting, **(values | changes))


def test_the_verdict_names_who_is_to_blame() -> None:
    waits, works = _status(0, is_waiting=True), _status(1, is_waiting=False)
    named = "rank 1 on node-1 is at update 7, in train for 61 s, at a.py:1 in f"
    assert (
        verdict("It hangs", {0: waits, 1: works}, world_size=2)
        == f"It hangs. {named}; the others wait for it"
    )
    assert verdict("It hangs", {0: waits}, world_size=3) == (
        "It hangs. rank 1, 2 does not answer: stopped, or gone"
    )
    both = verdict("It hangs", {0: waits, 1: _status(1, is_waiting=True)}, world_size=2)
    assert both.startswith("It hangs. every rank waits for others: rank 0 on node-0")
    alone = verdict("It hangs", {0: _status(0, is_waiting=False)}, world_size=1)
    assert "the others" not in alone
    assert RankStatus.from_json(works.to_json()) == works


def test_the_place_of_a_thread_is_its_innermost_line() -> None:
    ready, done = threading.Event(), threading.Event()

    def wait_here() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait_here)
    thread.start()
    ready.wait()
    assert innermost(thread.ident or 0).endswith("in wait")
    done.set()
    thread.join()
    assert innermost(thread.ident or 0) == "unknown"


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/venv/bin/python", "/venv/bin/deepspeed", "--hostfile", "f"], True),
        (["/venv/bin/python", "-m", "aiprod_ds", "launch", "c.yaml"], True),
        (["/venv/bin/aiprod-ds", "launch"], True),
        (["bash", "/home/me/aiprod_ds/launch/train_local.sh", "c.yaml"], True),
        (["bash", "/home/me/aiprod_ds/my_script.sh"], False),
        (["python", "-m", "aiprod_ds.testing.fork_server"], False),
        (["python", "-m", "pytest", "tests/deepspeed"], False),
        (["slurmstepd:", "[1.0]"], False),
        ([""], False),
    ],
)
def test_launchers_are_known_by_their_command(command: list[str], is_one: bool) -> None:
    assert orphans._is_launcher(command) is is_one


_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
child.wait()
"""
_RANK = """
import time
from aiprod_ds.train.orphans import Launchers
found = Launchers.of_this_process()
print(len(found.processes), found.gone(), flush=True)
while (gone := found.gone()) is None:
    time.sleep(0.02)
print(gone, flush=True)
"""


def test_a_launcher_that_dies_is_missed(tmp_path: Path) -> None:
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "launch.py").write_text(_CHILD)
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.launch",
            f"import sys; sys.path[0] = '{Path.cwd()}'{_RANK}",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "1 None\n"
    launcher.kill()
    launcher.wait()
    gone = launcher.stdout.readline()
    launcher.stdout.close()
    assert gone.startswith(f"process {launcher.pid} (")
    assert "deepspeed.launcher.launch" in gone


def test_a_launcher_behind_ssh_is_found_by_what_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Launchers.environment_of_this_process().items():
        monkeypatch.setenv(name, value)
    assert Launchers.of_this_process().gone() is None
    monkeypatch.setenv(orphans._VARIABLE, f"{orphans.socket.gethostname()}:{2**22 + 1}:5")
    assert Launchers.of_this_process().gone() == f"process {2**22 + 1} (aiprod-ds launch)"
    monkeypatch.setenv(orphans._VARIABLE, "another-host:5:5")
    assert Launchers.of_this_process().gone() is None


def test_a_missing_launcher_asks_the_run_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(orphans._VARIABLE, f"{orphans.socket.gethostname()}:{2**22 + 1}:5")
    stops = Stops()
    with Watchdog(tmp_path, least_seconds=1.0, stops=stops):
        deadline = time.monotonic() + 10
        while not stops.reason and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stops.reason == f"process {2**22 + 1} (aiprod-ds launch) is gone, which started this process"
