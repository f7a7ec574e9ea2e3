"""Ranks of a benchmark on this machine: one process a GPU, joined as a launcher's are, without a launcher.

Owns their start, their time limit and their end; what they measure comes back line by line while they run.
Called by `scaling.py`. It does not know what a line means.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from aiprod_ds.testing.processes import free_port

LINES = "measured.jsonl"
"""Rank 0 writes it, one JSON object a line, in the folder that all ranks are given."""
_POLL_SECONDS, _SURVIVOR_SECONDS = 0.1, 20.0
_TAIL_CHARACTERS = 3000


def run_ranks(
    command: Sequence[str],
    folder: Path,
    *,
    ranks: int,
    seconds_per_line: float,
    on_line: Callable[[Any], None],
) -> str | None:
    """Runs `python COMMAND` on so many ranks and returns what went wrong, with the end of the output; None if
    nothing did. No process is left behind.

    Args:
        command: Of every rank; the environment tells them apart.
        folder: Exists; gets what they write to stdout and stderr.
        ranks: The first so many GPUs, or CPU processes without one.
        seconds_per_line: All are killed if none comes for so long.
        on_line: Called with each object as soon as its line is there.
    """
    port = str(free_port())
    with ExitStack() as stack:
        processes = [stack.enter_context(_start(command, folder, rank, ranks, port)) for rank in range(ranks)]
        try:
            return _watch(processes, folder, seconds_per_line, on_line)
        finally:
            for process in processes:
                process.kill()


def _start(command: Sequence[str], folder: Path, rank: int, ranks: int, port: str) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": "1",  # as launchers set it, too
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a rank that is aborted says where it stood
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    with _output(folder, rank).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _watch(
    processes: list[subprocess.Popen[bytes]],
    folder: Path,
    seconds_per_line: float,
    on_line: Callable[[Any], None],
) -> str | None:
    num_read, last = 0, time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        lines = _lines(folder)
        for line in lines[num_read:]:
            on_line(json.loads(line))
            last = time.monotonic()
        num_read = len(lines)
        if all(code == 0 for code in codes):
            return None
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            _await_survivors(processes)
            return f"rank {failed} exited with {codes[failed]}\n{_tail(folder, failed)}"
        if time.monotonic() - last > seconds_per_line:
            for process in processes:
                process.send_signal(signal.SIGABRT)
            _await_survivors(processes)
            return f"nothing was measured in {seconds_per_line:.0f} s\n{_tail(folder, 0)}"
        time.sleep(_POLL_SECONDS)


def _await_survivors(processes: list[subprocess.Popen[bytes]]) -> None:
    """Gives the other ranks time to say what they saw."""
    until = time.monotonic() + _SURVIVOR_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)


def _lines(folder: Path) -> list[str]:
    path = folder / LINES
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _tail(folder: Path, rank: int) -> str:
    return _output(folder, rank).read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"
