"""Looks into many files at once, in processes of their own: a file at which FFmpeg crashes ends one of them,
and is named.

The processes are plain children that run this module and speak lines of JSON through pipes; nothing is forked
and the user's script is not imported again. Owns them and what a line holds; what is looked for is
`probe.py`'s. Called by `aiprod_ds.data.probe_cache`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from aiprod_ds.decode.probe import look_into
from aiprod_ds.decode.record import Details, MediaRecord, Medium, Probed
from aiprod_ds.errors import DataError

_MAX_WORKERS = 16
_READY = b"ready\n"
_log = logging.getLogger(__name__)
_OF_RECORD = {field.name: field.default for field in fields(MediaRecord) if field.name != "path"}
_OF_DETAILS = {field.name: field.default for field in fields(Details)}


def default_num_workers() -> int:
    """Returns how many processes may look into files: one for each core that this process may use, shared
    among the ranks of the host, 16 at most."""
    # torchrun's name, then DeepSpeed's.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    shared = max(1, int(ranks)) if ranks.isdecimal() else 1
    return max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // shared))


class ProbePool:
    """Processes that look into files. Close it.

    Args:
        num_workers: How many, at least 1; each is started when it is first needed.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="probe")
        self._own = threading.local()
        self._all: list[_Worker] = []

    def submit(self, file: Path, medium: Medium) -> Future[Probed]:
        """Returns what `probe.look_into` will give; a crash is a `DataError`, too."""
        return self._threads.submit(self._look, file, medium)

    def close(self) -> None:
        """Ends the processes; what is not done is not done any more. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown(wait=True)
        for worker in self._all:
            worker.close()

    def _look(self, file: Path, medium: Medium) -> Probed:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker()
            self._all.append(worker)
        return worker.look(file, medium)


class _Worker:
    """One process; started anew after a crash. Where none can be started, files are looked into here."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ended = False

    def look(self, file: Path, medium: Medium) -> Probed:
        if self._process is None and not self._is_ended:
            self._process = _start()
            if self._process is None:
                return look_into(file, medium=medium)
        answer = self._ask(json.dumps([os.fspath(file), medium]))
        if answer is None:
            raise DataError(f"ended the process that looked into it ({self._crash()})")
        if isinstance(answer, str):
            raise DataError(answer)
        return from_json(answer, path=str(file))

    def end(self) -> None:
        """Ends the process; a thread that waits for it goes on."""
        self._is_ended = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Closes the pipes of a process that was ended."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _crash(self) -> str:
        if self._process is None or self._is_ended:
            return "asked to end"
        code = self._process.wait()
        self.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _ask(self, line: str) -> Any:
        """Returns the answer; None if the process ended."""
        if self._process is None:
            return None
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer.endswith(b"\n") else None


def to_json(probed: Probed) -> list[dict[str, Any]]:
    """Returns what `from_json` takes: what is as usual is left out, and the path."""
    return [
        {name: value for name, usual in known.items() if (value := getattr(of, name)) != usual}
        for known, of in ((_OF_RECORD, probed.record), (_OF_DETAILS, probed.details))
    ]


def from_json(values: list[dict[str, Any]], *, path: str) -> Probed:
    """Returns what was given to `to_json`.

    Raises:
        TypeError: If a field is unknown or missing.
        ValueError: If there are not two mappings.
    """
    record, details = values
    tuples = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    return Probed(record=MediaRecord(**{**record, **tuples, "path": path}), details=Details(**details))


def _start() -> subprocess.Popen[bytes] | None:
    """Returns a process that is ready; None, with a warning, if there is none to be had."""
    # Where the package lies, which another current folder need not find.
    paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    except (OSError, ValueError, TypeError) as error:
        _log.warning("files are looked into one by one, no process can be started: error=%s", error)
        return None
    assert process.stdout is not None, "a pipe"
    if process.stdout.readline() == _READY:
        return process
    process.communicate()
    _log.warning("files are looked into one by one, a process ended at once: code=%s", process.returncode)
    return None


def _serve() -> None:
    """Answers each line on standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        path, medium = json.loads(line)
        try:
            answer: Any = to_json(look_into(Path(path), medium=medium))
        except DataError as error:
            answer = str(error)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
