"""Signals and request files, as the loop sees them: what counts, what is taken away, and what a second signal
does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aiprod_ds.train.interrupts import SIGNALS, Interrupt, Interrupts, SignalWatch


class Time:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


# Prints what it does and then waits in a C call, where no handler that is written in Python can run.
PROGRAM = """
import ctypes, logging, os, sys
from aiprod_ds.train import interrupts
interrupts.ONE_REQUEST_SECONDS = {seconds}
logging.basicConfig(stream=sys.stdout, format="%(message)s")
reader, writer = os.pipe()
with interrupts.SignalWatch():
    print("open", flush=True)
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
"""


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("EVALUATE", Interrupt.EVALUATE), ("SAVE", Interrupt.SAVE), ("STOP", Interrupt.STOP)],
)
def test_a_file_is_seen_and_taken_away_once_it_is_done(tmp_path: Path, name: str, wanted: Interrupt) -> None:
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    assert requests.agreed() is Interrupt.NONE
    (tmp_path / name).touch()
    now.seconds = 1.0
    assert requests.agreed(at_once=True) is wanted
    requests.done(wanted)
    assert list(tmp_path.iterdir()) == []
    now.seconds = 2.0
    assert requests.agreed(at_once=True) is Interrupt.NONE


def test_of_both_files_stop_counts_and_a_done_save_leaves_a_later_stop(tmp_path: Path) -> None:
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    for name in ("SAVE", "STOP"):
        (tmp_path / name).touch()
    requests.done(Interrupt.SAVE)
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]
    assert requests.agreed(at_once=True) is Interrupt.STOP


def test_a_stop_has_saved_but_leaves_the_evaluation_to_the_next_start(tmp_path: Path) -> None:
    requests = Interrupts(SignalWatch(), tmp_path, now=Time())
    for name in ("EVALUATE", "SAVE", "STOP"):
        (tmp_path / name).touch()
    assert requests.agreed(at_once=True) is Interrupt.STOP
    requests.done(Interrupt.STOP)
    assert [path.name for path in tmp_path.iterdir()] == ["EVALUATE"]


def test_long_work_ends_for_a_stop_alone(tmp_path: Path) -> None:
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    (tmp_path / "EVALUATE").touch()
    (tmp_path / "SAVE").touch()
    assert not requests.is_stop_agreed()
    (tmp_path / "STOP").touch()
    now.seconds = 1.0
    assert requests.is_stop_agreed()
    assert requests.agreed(at_once=True) is Interrupt.STOP, "still to be done"


def test_the_folder_is_looked_into_about_once_a_second(tmp_path: Path) -> None:
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    assert requests.agreed(at_once=True) is Interrupt.NONE
    (tmp_path / "SAVE").touch()
    now.seconds = 0.9
    assert requests.agreed(at_once=True) is Interrupt.NONE
    now.seconds = 1.0
    assert requests.agreed(at_once=True) is Interrupt.SAVE


def test_a_vote_is_read_one_boundary_later_and_at_once_where_updates_are_slow(tmp_path: Path) -> None:
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    (tmp_path / "STOP").touch()
    assert requests.agreed() is Interrupt.NONE
    assert requests.agreed() is Interrupt.STOP

    requests.done(Interrupt.STOP)
    assert requests.agreed() is Interrupt.NONE
    now.seconds += 1.0
    assert requests.agreed() is Interrupt.NONE
    now.seconds += 1.0
    assert requests.agreed() is Interrupt.NONE, "tells that the update before took a second"
    (tmp_path / "STOP").touch()
    now.seconds += 1.0
    assert requests.agreed() is Interrupt.STOP


def test_a_file_that_cannot_be_removed_asks_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "SAVE").mkdir()  # `unlink` refuses it, as it does a file of a read-only disk
    now = Time()
    requests = Interrupts(SignalWatch(), tmp_path, now=now)
    assert requests.agreed(at_once=True) is Interrupt.SAVE
    requests.done(Interrupt.SAVE)
    assert caplog.text.count("request_not_removed name=SAVE") == 1
    now.seconds += 1.0
    assert requests.agreed(at_once=True) is Interrupt.NONE
    (tmp_path / "SAVE").rmdir()
    now.seconds += 1.0
    assert requests.agreed(at_once=True) is Interrupt.NONE
    (tmp_path / "SAVE").touch()
    now.seconds += 1.0
    assert requests.agreed(at_once=True) is Interrupt.SAVE


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wantedto_stop(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with SignalWatch() as watch:
        requests = Interrupts(watch, tmp_path)
        os.kill(os.getpid(), number)
        while watch.received is None:
            threading.Event().wait(0.001)
        assert watch.received == number
        assert requests.agreed(at_once=True) is Interrupt.STOP
        os.kill(os.getpid(), number)  # as through the launcher: it belongs to the same request
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_a_forked_process_has_its_own_signals() -> None:
    program = """
import os, signal, threading
from aiprod_ds.train.interrupts import SignalWatch
reader, writer = os.pipe()
with SignalWatch() as watch:
    child = os.fork()
    if child == 0:
        os.write(writer, b"!")
        signal.pause()
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    while watch.received is None:
        threading.Event().wait(0.001)
    assert watch.received == signal.SIGUSR1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_leaves_at_once_even_from_a_c_call(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(seconds=0)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.send_signal(number)
        assert process.stdout.readline().startswith(f"signal_received name={number.name}")
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


def test_without_the_main_thread_signals_keep_their_meaning() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    seen = []

    def work() -> None:
        with SignalWatch() as watch:
            seen.append((watch.received, [signal.getsignal(each) for each in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_spike_is_told_with_the_next_vote_and_asks_for_nothing(tmp_path: Path) -> None:
    has_spiked = False
    requests = Interrupts(SignalWatch(), tmp_path, has_spiked=lambda: has_spiked, now=Time())
    assert requests.agreed() is Interrupt.NONE
    has_spiked = True
    assert requests.agreed() is Interrupt.NONE
    assert not requests.has_any_spiked, "of the vote before"
    assert requests.agreed() is Interrupt.NONE
    assert requests.has_any_spiked
    requests.finish()
    requests.finish()
