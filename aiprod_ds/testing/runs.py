"""Comparing whole training runs: a run folder as a kill leaves it, and the record that a resumed run must
repeat bit for bit.

Owns what tests of resuming share, of this project and of its users; records hold only what JSON can.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from aiprod_ds.engine import dist
from aiprod_ds.metrics.jsonl import read_metrics
from aiprod_ds.report.page import sink
from aiprod_ds.report.summary import RunSummary
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.train import reporting

_MEASURED_TIME = ("time/", "throughput/", "memory/")
_WRITTEN_AT_THE_END = ("export", "plots", "report.json", "report.md", "report.html")


def alike_on_ranks(
    function: Callable[..., dict[str, Any]], *, ranks: int, folder: Path, **arguments: Any
) -> dict[str, Any]:
    """Returns what `function(folder=..., **arguments)` returns on each of `ranks` CPU ranks, which must be
    the same on all of them.

    Raises:
        EngineError: As `run_on_ranks`.
    """
    results: list[dict[str, Any]] = run_on_ranks(
        function, ranks=ranks, arguments={"folder": str(folder), **arguments}, timeout_seconds=600
    )
    assert all(result == results[0] for result in results), "every rank reports the run's own numbers"
    return results[0]


def train_and_resume(
    train: Callable[[Path], dict[str, Any]], whole: Path, resumes: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Trains once without interruption and once more from each of some checkpoints, without plots.
    Collective.

    Args:
        train: Trains in a folder, from the newest checkpoint there if it has one, and returns a record of the
            run.
        whole: Folder of the uninterrupted run; the others stand beside it.
        resumes: By name, the update of the checkpoint to go on from.

    Returns:
        The records: `whole` and each name of `resumes`.
    """
    with without_plots():
        records = {"whole": train(whole)}
        for name, update in resumes.items():
            copy = whole.with_name(f"{whole.name}_{name}")
            if dist.is_main():
                copy_as_if_stopped_at(update, whole, copy)
            dist.barrier()
            # what the first run has imported need not be looked through whenever an engine closes
            gc.freeze()
            records[name] = train(copy)
    return records


@contextmanager
def without_plots() -> Iterator[None]:
    """Leaves the plots and the page out of the reports of runs in the block: to make them takes longer than a
    small training."""
    with (
        patch.object(reporting, "save_plots", lambda *_, **__: ()),
        patch.object(reporting, "write_page", lambda *_, **__: None),
        patch.object(sink, "write_page", lambda *_, **__: None),
    ):
        yield


def copy_as_if_stopped_at(update: int, whole: Path, copy: Path) -> None:
    """Copies a finished run's folder without later checkpoints than `update`'s and without what a run writes
    at its end.

    metrics.jsonl stays whole: a killed run has written rows beyond its last checkpoint.
    """
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns(*_WRITTEN_AT_THE_END))
    for checkpoint in (copy / "checkpoints").glob("update_*"):
        if int(checkpoint.name.removeprefix("update_")) > update:
            shutil.rmtree(checkpoint)


def record_of(summary: RunSummary, folder: Path) -> dict[str, Any]:
    """Returns what a resumed run must repeat, and from where it was resumed. Collective.

    Returns:
        `sha256` of parameters and optimizer state, `rows` as `repeatable_rows` has them, `updates` of each
        phase, and `resumed_from`, the names of checkpoints.
    """
    dist.barrier()  # the main rank writes after the others have their summary
    return {
        "sha256": summary.final_state_sha256,
        "rows": repeatable_rows(folder),
        "updates": [phase.updates for phase in summary.phases],
        "resumed_from": list(summary.resumed_from),
    }


def repeatable_rows(folder: Path) -> list[Any]:
    """Returns [update, metrics] of every row of a run folder's metrics.jsonl, without what a clock or the
    machine measured."""
    return [
        [update, {name: value for name, value in metrics.items() if not name.startswith(_MEASURED_TIME)}]
        for update, metrics in read_metrics(folder / "metrics.jsonl")
    ]


def series(record: Mapping[str, Any], metric: str) -> list[float]:
    """Returns the values of one metric in a record's rows, in the order of updates."""
    return [metrics[metric] for _, metrics in record["rows"] if metric in metrics]
