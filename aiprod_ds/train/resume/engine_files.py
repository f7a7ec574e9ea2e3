"""What engine and average are, in one folder of files that all ranks write and any number of ranks reads.

Owns how an error of one rank is raised on all. Commits nothing: `saver.py` does, which writes through this
file, and the start of a run reads through it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aiprod_ds.checkpoint.disk import write_error
from aiprod_ds.checkpoint.manifest import FileRecord
from aiprod_ds.checkpoint.shard_files import ShardReader, write_shards
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.errors import AiprodError
from aiprod_ds.optim.ema import Ema
from aiprod_ds.snapshot import Base, EngineFacts, Snapshot
from aiprod_ds.train.resume.frozen_base import require_same_base
from aiprod_ds.train.unit import Companion


def capture(
    engine: Engine, ema: Ema | None = None, base: Base | None = None, companion: Companion | None = None
) -> Snapshot:
    """Returns what this rank writes of engine, average and companion, not copied; without frozen weights
    where there is a `base`."""
    state = engine.capture()
    if ema is not None:
        state = ema.capture(state)
    if base is not None:
        state = state.on(base)
    return state if companion is None else state.beside(companion.capture())


def write_engine(folder: Path, engine: Engine, ema: Ema | None = None, base: Base | None = None) -> None:
    """Writes what `read_engine` needs into an existing folder, each rank its own part. Collective; nothing is
    committed here.

    Raises:
        DiskFullError: On every rank, if one had no room.
        CheckpointError: On every rank, if one failed otherwise.
    """
    write_together(folder, capture(engine, ema, base))


def read_engine(
    folder: Path,
    engine: Engine,
    ema: Ema | None = None,
    *,
    companion: Companion | None = None,
    origin: str = "the weights that the engine was built with",
) -> EngineFacts:
    """Restores engine, average and companion from what any number of ranks wrote under any ZeRO stage;
    returns what they were. Collective.

    Args:
        folder: Of the engine, in a checkpoint.
        engine: As it was built: its frozen weights may be those that the checkpoint refers to.
        ema: If the run keeps one.
        companion: If the run trains one. Without it, one that was saved is passed over.
        origin: Of the engine's weights, in words.

    Raises:
        CheckpointError: If `folder` is damaged, or of another model, precision or base.
    """
    with ShardReader(folder) as reader:
        base = reader.facts.base
        if base is not None and not base.is_stored:
            require_same_base(engine, base, folder=folder, origin=origin)
        engine.restore(reader)
        if ema is not None:
            ema.restore(reader)
        facts = reader.facts
    if companion is not None:
        with ShardReader(folder, of_companion=True) as beside:
            companion.restore(beside)
    return facts


def write_together(folder: Path, state: Snapshot) -> None:
    """Every rank writes its chunks; an error of one is raised on all."""
    gather_records(lambda: write_shards(folder, state), folder)


def gather_records(write: Callable[[], dict[str, FileRecord]], folder: Path) -> dict[str, FileRecord]:
    """Returns what all ranks have written; an error of one is raised on all. Collective."""
    outcomes = dist.gather_objects(_outcome(write, folder))
    for outcome in outcomes:
        if isinstance(outcome, AiprodError):
            raise outcome
    return {
        name: record for outcome in outcomes if isinstance(outcome, dict) for name, record in outcome.items()
    }


def _outcome(write: Callable[[], dict[str, FileRecord]], folder: Path) -> dict[str, FileRecord] | AiprodError:
    try:
        return write()
    except Exception as error:  # noqa: BLE001  whatever a writer raises, the other ranks must hear of it
        return write_error(error, folder)
