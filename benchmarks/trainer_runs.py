"""Training in a benchmark's own process, with what it leaves out and what it looks at: shared by the
benchmarks of the trainers.

Nothing is saved, because a checkpoint of 25 GB takes longer than the updates that are measured.
`measured_training` runs a trainer through its phase, ends it before the export, and reads the memory of the
device around the parts of an update. `timed_training` takes the time of as many updates as are wanted and
ends the run after them.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from update_timer import UpdateTimer

from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine
from aiprod_ds.engine.protocol import Engine, UpdateResult
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.metrics.recorder import MetricsRecorder
from aiprod_ds.report.environment import device_peak_bytes
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.state import TrainState
from aiprod_ds.trainers.base import Trainer


class _FinishedError(Exception):
    """What was wanted has been measured."""


def run_in_own_process(script: str, case: str, *options: str) -> Any:
    """Returns what `script --measure CASE` wrote as JSON; ends this program with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else {})}
        finished = subprocess.run(
            [sys.executable, script, "--measure", case, "--output", str(output), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise SystemExit(f"{case}: exited with {finished.returncode}\n{finished.stdout[-6000:]}")
        return json.loads(output.read_text())


def measured_training(trainer: Trainer[Any]) -> dict[str, Any]:
    """Trains a run of one phase without saving, and returns its rows and its memory. Inside
    `dist.process_group`.

    Returns:
        `rows`: metrics of every update; `memory`: of the first update, bytes that tensors take on the device
        at the end of forward (`forward`), backward (`backward`) and the update (`update`), and the highest
        since the phase began (the same names with `_peak`); `reserved` by torch's allocator and `used` on the
        device by the end of the phase.
    """
    memory: dict[str, int] = {}
    with _watched(memory), suppress(_FinishedError):
        trainer.train(resume="never")
    gc.collect()
    rows = [
        row
        for _, row in read_metrics(Path(trainer.config.output_dir) / "metrics.jsonl")
        if "loss/total" in row
    ]
    return {"rows": rows, "memory": memory}


def timed_training(
    trainer: Trainer[Any], timer: UpdateTimer, *, after_first: Callable[[Engine], None]
) -> dict[str, float]:
    """Trains until `timer` has seen enough updates, without saving. Inside `dist.process_group`.

    Args:
        trainer: Its phase must be longer.
        timer: Is told of every applied update once the loop has recorded it: what the loop does between two
            updates is in the time.
        after_first: Called with the engine after the first update.

    Returns:
        `first_seconds`, of the first update; its loss on this rank, `first_loss`, and the norm of its
        gradient, `first_norm`; and `waited_seconds`, for the loader inside of the timed runs.

    Raises:
        SystemExit: If the run ended by itself, as it does when it is sent a signal.
    """
    found = {"first_seconds": 0.0, "first_loss": 0.0, "first_norm": 0.0, "waited_seconds": 0.0}

    def recorded(metrics: Mapping[str, Any]) -> None:
        if not found["first_seconds"]:
            found["first_seconds"] = metrics["time/update_seconds"]
            found["first_loss"] = float(metrics["loss/total"])
            found["first_norm"] = float(metrics["gradient/norm"])
        is_last = timer.after_update()
        found["waited_seconds"] += metrics["time/data_wait_seconds"] * timer.is_measuring
        if is_last:
            raise _FinishedError

    with _told_of_updates(recorded, after_first), suppress(_FinishedError):
        summary = trainer.train(resume="never")
        raise SystemExit(f"the run ended before enough updates were timed: {summary.status.value}")
    gc.collect()
    return found


def seconds_per_update(rows: list[dict[str, float]], *, dropped: int) -> float:
    """Returns the mean over the rows after the first `dropped`."""
    measured = rows[dropped:]
    return sum(row["time/update_seconds"] for row in measured) / len(measured)


@contextmanager
def _watched(memory: dict[str, int]) -> Iterator[None]:
    """Reads memory around the engine's calls, and ends the run where it would save, while the block runs."""
    backward, step, save = DeepSpeedEngine.backward, DeepSpeedEngine.step, Saver.save

    def watched_backward(engine: DeepSpeedEngine, loss: Tensor) -> None:
        _note(memory, "forward")
        backward(engine, loss)
        _note(memory, "backward")

    def watched_step(engine: DeepSpeedEngine) -> UpdateResult | None:
        result = step(engine)
        _note(memory, "update")
        return result

    def finished(*_arguments: Any) -> None:
        memory.update(_reserved())
        raise _FinishedError

    try:
        DeepSpeedEngine.backward, DeepSpeedEngine.step = watched_backward, watched_step  # type: ignore[method-assign]
        Saver.save = finished  # type: ignore[method-assign]
        yield
    finally:
        DeepSpeedEngine.backward, DeepSpeedEngine.step, Saver.save = backward, step, save  # type: ignore[method-assign]


@contextmanager
def _told_of_updates(
    recorded: Callable[[Mapping[str, Any]], None], after_first: Callable[[Engine], None]
) -> Iterator[None]:
    """Calls `recorded` with what the loop records of every update, and `after_first` where it would get
    memory for copies, while the block runs; no such memory is got."""
    record, reserve = MetricsRecorder.record, Saver.reserve

    def told(recorder: MetricsRecorder, update: int, metrics: Mapping[str, float | Tensor]) -> None:
        record(recorder, update, metrics)
        recorded(metrics)

    def first_done(_saver: Saver, trained: TrainState) -> None:
        after_first(trained.engine)

    try:
        MetricsRecorder.record = told  # type: ignore[method-assign]
        Saver.reserve = first_done  # type: ignore[method-assign]
        yield
    finally:
        MetricsRecorder.record, Saver.reserve = record, reserve  # type: ignore[method-assign]


def _note(memory: dict[str, int], part: str) -> None:
    if part not in memory:
        memory |= {part: _allocated(), f"{part}_peak": device_peak_bytes()}


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]


def _reserved() -> dict[str, int]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {"reserved": 0, "used": 0}
    free, total = torch.cuda.mem_get_info()
    return {"reserved": torch.cuda.max_memory_reserved(), "used": total - free}
