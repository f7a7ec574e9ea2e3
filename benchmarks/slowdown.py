"""Has an update through the trainer become dearer than it was, beside a bare loop of the same module?

Two blocks of LTX-Video's transformer, so narrow that what costs is Python, torch's dispatch and the
optimizer's calls. It is counted, not timed, so it is the same on a busy machine, on which even the CPU time
of a process varies several times over, and on an idle one:

    operations   that torch dispatches, below autograd
    reads        of a number from a tensor, each of which waits for a GPU
    calls        of Python functions, of the thread that trains
    bytes        of the tensors that are made
    peak bytes   the most of them that are alive at once

Each is that of an update through the trainer over that of an update of the bare loop; of reads, which the
loop does not need, it is their number.

`benchmarks/slowdown_baseline.json` has what it was. `tests/unit/benchmarks/test_slowdown.py` fails where it
is more by a twentieth, or a quarter with other versions of Python, torch, DeepSpeed or diffusers than the
baseline's. A slowdown that is meant is written down:

    python benchmarks/slowdown.py --renew        (or: make baseline)

It does not show: time itself, the device's share, several ranks, the loader's workers, compiled blocks, or
slowdowns that are smaller than the margins; `host_time.py` and `training_speed.py` measure those.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from bare_loops import LOOPS, new_job
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_runs import timed_training
from workload import Choices, Shape
from workloads import Transformer

from aiprod_ds.engine import dist
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.report.environment import describe_environment
from aiprod_ds.testing.runs import without_plots

BASELINE = Path(__file__).with_name("slowdown_baseline.json")
COUNTS = ("operations", "reads", "calls", "bytes", "peak bytes")
ENGINES = ("local", "deepspeed")
_VERSIONS = ("python", "torch", "deepspeed", "diffusers")
_MARGIN, _MARGIN_OF_OTHER_VERSIONS = 1.05, 1.25
_FLUSH_UPDATES = 10  # metrics are read once in so many updates, which a count must have in proportion
_WARM_UPS = 3
_SHAPE = Shape(length=9, size=64, batch=2)
_WORKLOAD = Transformer(config=LTXVideo.tiny_config(), shapes={"low": _SHAPE}, text_tokens=8)


def main() -> int:
    """Prints what an update costs beside the baseline; with `--renew` writes it down."""
    parser = argparse.ArgumentParser(
        description="What an update through the trainer costs beside a bare loop."
    )
    parser.add_argument("--renew", action="store_true", help="make what is measured the baseline")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with dist.process_group():
        found = measure_all()
    for name, value in found.items():
        known = json.loads(BASELINE.read_text())["ratios"].get(name) if BASELINE.exists() else None
        print(f"{name}: {value:.4g} of the bare loop's, {known} in the baseline")
    if arguments.renew:
        baseline = {
            "versions": versions(),
            "ratios": {name: round(value, 4) for name, value in found.items()},
        }
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
        return 0
    problems = exceeded(found, json.loads(BASELINE.read_text()))
    print(*problems, sep="\n")
    return 1 if problems else 0


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions that counts depend on; of Python without the patch."""
    found = describe_environment()["versions"]
    shown = {name: str(found[name]) for name in _VERSIONS}
    return {**shown, "python": ".".join(shown["python"].split(".")[:2])}


def exceeded(found: Mapping[str, float], baseline: Mapping[str, Any]) -> list[str]:
    """Returns what is more than its baseline by more than its margin, in words.

    Args:
        found: As `measure` returns it.
        baseline: What the file holds.
    """
    margin = _MARGIN if baseline["versions"] == versions() else _MARGIN_OF_OTHER_VERSIONS
    problems = []
    for name, value in found.items():
        allowed = baseline["ratios"][name] * margin
        if value > allowed:
            problems.append(
                f"{name} of an update: must be at most {allowed:.4g} times the bare loop's, got {value:.4g} "
                f"(the baseline is {baseline['ratios'][name]:.4g}). Find what became slower, or, if it is "
                "meant: make baseline."
            )
    return problems


def measure_all() -> dict[str, float]:
    """Returns every ratio of both engines. Inside `dist.process_group`."""
    bare = measure_bare()
    return {
        f"{engine}, {name}": value
        for engine in ENGINES
        for name, value in ratios(measure_trainer(engine), bare).items()
    }


def ratios(costs: Mapping[str, float], bare: Mapping[str, float]) -> dict[str, float]:
    """Returns one side's costs over the other's; of reads, of which a bare loop needs none, the number."""
    return {name: value if name == "reads" else value / bare[name] for name, value in costs.items()}


def measure_bare() -> dict[str, float]:
    """Returns what an update of the bare loop costs."""
    job = new_job(_WORKLOAD, _SHAPE, torch.device("cpu"), _choices("local"), backend="eager")
    loop, meter = LOOPS["plain"](job), Meter()
    loop.update()
    while not meter.after_update():
        loop.update()
    loop.close()
    return meter.costs()


def measure_trainer(engine: str) -> dict[str, float]:
    """Returns what an update through the trainer costs, the same module with the same batch."""
    meter = Meter()
    # A run that is broken off writes its report; pictures of it would take longer than all of its updates.
    with tempfile.TemporaryDirectory() as folder, without_plots():
        trainer = _WORKLOAD.trainer_of(
            _SHAPE,
            Path(folder) / "run",
            _choices(engine),
            model=_WORKLOAD.model("cpu"),
            performance={"compile": "off"},
        )
        timed_training(trainer, meter, after_first=lambda _engine: None)
    return meter.costs()


def _choices(engine: str) -> Choices:
    return Choices(compiles=False, engine=engine, workers=0)


@dataclass(slots=True)
class Meter:
    """Is told of every update, as an `UpdateTimer` is; looks at operations in some and at calls in others."""

    _done: int = 0
    _found: dict[str, float] = field(default_factory=dict)
    _stop: Callable[[], None] | None = None

    @property
    def is_measuring(self) -> bool:
        """Nobody waits for a loader here."""
        return False

    def after_update(self) -> bool:
        """Notes an update; returns whether it was the last one."""
        self._done += 1
        done = self._done - _WARM_UPS
        if 0 < done <= _FLUSH_UPDATES:
            gc.collect()  # what an update leaves in circles counts as alive until then, and no longer
        if done < 0 or done % _FLUSH_UPDATES:
            return False
        if self._stop is not None:
            self._stop()
        windows = (self._dispatched, self._called)
        window = done // _FLUSH_UPDATES
        if window == 0:
            _collect_no_more()
        self._stop = windows[window]() if window < len(windows) else None
        if self._stop is None:
            gc.enable()
            gc.unfreeze()
        return self._stop is None

    def costs(self) -> dict[str, float]:
        """Returns each cost of an update."""
        return {name: self._found[name] for name in COUNTS}

    def _dispatched(self) -> Callable[[], None]:
        counter = _Dispatched()
        counter.__enter__()

        def stop() -> None:
            counter.__exit__(None, None, None)
            self._found |= {
                "operations": counter.operations / _FLUSH_UPDATES,
                "reads": counter.reads / _FLUSH_UPDATES,
                "bytes": counter.num_bytes / _FLUSH_UPDATES,
                "peak bytes": float(counter.peak_bytes),
            }

        return stop

    def _called(self) -> Callable[[], None]:
        calls = 0

        def count(_frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)

        def stop() -> None:
            sys.setprofile(None)
            self._found["calls"] = calls / _FLUSH_UPDATES

        return stop


def _collect_no_more() -> None:
    """Keeps Python from looking for circles at moments that depend on what else the process holds, and makes
    looking for those of an update cheap."""
    gc.freeze()
    gc.disable()


class _Dispatched(TorchDispatchMode):
    """Counts operations, reads of numbers, and the memory of tensors made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = self.num_bytes = self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._live_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in known and id(storage) not in self._alive:
                    self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._alive[key] = size
        self.num_bytes += size
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

        def gone() -> None:
            self._live_bytes -= self._alive.pop(key, 0)

        weakref.finalize(storage, gone)


if __name__ == "__main__":
    sys.exit(main())
