"""The run folder: what stands in it before the first update, and where the rows of the metrics go.

Owns moving an earlier run aside and the files that say what was asked for. Checkpoints are
`aiprod_ds.checkpoint`, the report is `reporting.py`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.console import Console

from aiprod_ds.bad_disk import DiskWatch, disk_required
from aiprod_ds.clock import Clock
from aiprod_ds.config.fingerprint import to_yaml
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.describe import describe
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.files import remove_temporary, write_atomically
from aiprod_ds.metrics.jsonl import JsonlSink
from aiprod_ds.metrics.sinks import MirrorSink, Sink
from aiprod_ds.metrics.wandb import open_wandb
from aiprod_ds.report.console import ConsoleSink, PhaseSpan
from aiprod_ds.report.environment import describe_environment
from aiprod_ds.report.page.run_page import PAGE
from aiprod_ds.report.page.sink import PageSink
from aiprod_ds.train.resume.folder_lock import FolderLock

_LOG = logging.getLogger(__name__)


def prepare_folder(
    config: RunConfig, plan: RunPlan, lock: FolderLock, *, resumed_at: Clock | None, move_aside: bool
) -> None:
    """Makes the run folder and writes configuration, plan and environment into it; on the main rank.

    Args:
        config: Names the folder.
        plan: As it will run.
        lock: Of the folder; taken here, once the folder is there.
        resumed_at: Where the checkpoint stands that the run goes on from; None for a new run.
        move_aside: Whether what is in the folder is renamed first.

    Raises:
        DiskError: If the disk does not take it.
    """
    folder = Path(config.output_dir)
    if move_aside and folder.exists() and any(folder.iterdir()):
        names = (folder.with_name(f"{folder.name}.{number}") for number in range(1, 10_000))
        old = next(path for path in names if not path.exists())
        with disk_required(folder, "another name"):
            folder.rename(old)
        _LOG.warning("previous_run_moved from=%s to=%s", folder, old)
    with disk_required(folder, "the files of a run"):
        _fill(folder, config, plan, lock, resumed_at=resumed_at)


def _fill(
    folder: Path, config: RunConfig, plan: RunPlan, lock: FolderLock, *, resumed_at: Clock | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    remove_temporary(folder)
    # Of an earlier start: its status would be taken for this one's.
    for report in ("report.json", "report.md", "report.html"):
        (folder / report).unlink(missing_ok=True)
    if resumed_at is not None:
        _keep_config(folder, to_yaml(config), until=resumed_at.updates)
    environment = "environment" if resumed_at is None else f"environment_from_{resumed_at.updates:06d}"
    write_atomically(folder / "config.yaml", to_yaml(config))
    write_atomically(folder / "plan.json", json.dumps(describe(plan), indent=1) + "\n")
    write_atomically(folder / f"{environment}.json", json.dumps(describe_environment(), indent=1) + "\n")


def _keep_config(folder: Path, new: str, *, until: int) -> None:
    """Keeps the configuration of the earlier start under another name if the new one differs."""
    current = folder / "config.yaml"
    if current.is_file() and current.read_text(encoding="utf-8") != new:
        current.replace(folder / f"config_before_{until:06d}.yaml")


def open_sinks(
    config: RunConfig,
    plan: RunPlan,
    console: Console,
    clock: Clock,
    *,
    is_resumed: bool,
    evaluates_again: bool,
    disk: DiskWatch,
) -> tuple[Sink, ...]:
    """Returns what takes the rows of the metrics; on the main rank.

    Args:
        config: Says which mirrors are wanted.
        plan: As it will run, for the progress display.
        console: Where progress is drawn.
        clock: Where the run goes on; rows of later updates, which a killed run left, are dropped.
        is_resumed: Whether there are rows to keep.
        evaluates_again: Whether the row of an evaluation at the clock's update will be written once more.
        disk: Survives what the disk does not take once the run has begun.

    Raises:
        DiskError: If the disk does not take the beginnings.
    """
    folder, from_update = Path(config.output_dir), clock.updates if is_resumed else None
    phases = [
        PhaseSpan(
            name=phase.name,
            updates=phase.length.maximum or phase.length.minimum,
            description=", ".join(bucket.shape_text for bucket in phase.buckets),
            relative_cost=phase.buckets[0].pixels_per_update,
        )
        for phase in plan.phases
    ]
    rows = folder / "metrics.jsonl"
    with disk_required(rows):
        lines = JsonlSink(rows, resume_from_update=from_update, evaluates_again=evaluates_again, disk=disk)
    progress = ConsoleSink(
        console,
        phases=phases,
        first_update=clock.updates,
        evaluation_updates=config.evaluation.every_updates,
    )
    sinks: list[Sink] = [lines, progress]
    if config.report.tensorboard:
        from aiprod_ds.metrics.tensorboard import TensorBoardSink  # an extra; not everybody has it

        with disk_required(folder / "tensorboard"):
            board = TensorBoardSink(folder / "tensorboard", resume_from_update=from_update, disk=disk)
        sinks.append(MirrorSink(board, name="tensorboard"))
    sinks.append(MirrorSink(PageSink(folder, disk=disk), name=PAGE))
    wandb = open_wandb(config.report.wandb, folder=folder, run_config=config.model_dump(mode="json"))
    return (*sinks, wandb) if wandb is not None else tuple(sinks)
