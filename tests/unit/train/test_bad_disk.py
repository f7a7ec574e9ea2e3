"""A run whose disk takes nothing for a while, at each of its writes in turn.

All writes of a small run are counted; then each in turn, and the two after it, fails as a disk does that is
full, read-only, failing, stale or unmounted. Oracle: the same run undisturbed, bit for bit, and its files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.checkpoint.shard_files import write_shards
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.errors import CheckpointError, DataError, DiskError
from aiprod_ds.metrics.evaluations import EvaluationRecord, read_evaluations
from aiprod_ds.report.summary import RunStatus, RunSummary
from aiprod_ds.testing.disks.faults import ERRNOS, BadDisk
from aiprod_ds.testing.runs import copy_as_if_stopped_at, repeatable_rows, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.resume import saver
from aiprod_ds.trainers.video_vae import VideoVAETrainer

COUNT = 3  # writes that fail, one after the other
UPDATES = 4
GO_ON = {"checkpoint": "go_on", "report": "go_on"}
STOP = {"checkpoint": "stop", "report": "stop"}
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    with without_plots():
        yield
    dist.shutdown()


def train(
    folder: Path, rules: dict[str, str], *, updates: int = UPDATES, checkpoint: dict[str, Any] | None = None
) -> RunSummary:
    clips = [SyntheticVideoDataset(num_clips=2, frames=5, height=16, width=16, seed=seed) for seed in (0, 1)]
    phase = {
        "name": "only",
        "updates": updates,
        "global_batch_size": 2,
        "resolution": "16x16",
        "duration": {"frames": 5},
        "learning_rate": 1e-2,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {"phases": [phase]},
        "engine": {"kind": "local", "deepspeed_config": {}},
        "checkpoint": {"every_updates": 2, "on_full_disk": rules["checkpoint"], **(checkpoint or {})},
        "evaluation": {"max_clips": 1, "num_pictures": 1, "every_updates": 2},
        "report": {"flush_updates": 1, "on_full_disk": rules["report"]},
    }
    torch.manual_seed(0)
    trainer = VideoVAETrainer(
        VAETrainerConfig.model_validate(values),
        model=TinyVideoVAE(),
        dataset=clips[0],
        validation=clips[1],
    )
    return trainer.train()


def evaluations(folder: Path) -> list[EvaluationRecord]:
    """Returns the records without what a disturbed run may lack: its media, and time."""
    return [replace(record, seconds=0.0, media=()) for record in read_evaluations(folder)]


def leftovers(folder: Path) -> list[str]:
    names = ("*.tmp", "*.part", "*.pending", ".unfinished")
    return [str(path.relative_to(folder)) for name in names for path in folder.rglob(name)]


class Undisturbed:
    """The run that all others are compared with, and its writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        disk = BadDisk(self.folder)
        with disk.watched():
            self.summary = train(self.folder, GO_ON)
        self.writes = disk.seen
        self.rows, self.records = repeatable_rows(self.folder), evaluations(self.folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    dist.initialize()
    with without_plots():
        found = Undisturbed(tmp_path_factory.mktemp("undisturbed"))
    dist.shutdown()
    return found


def require_survived(
    folder: Path,
    undisturbed: Undisturbed,
    *,
    kind: str,
    at: int,
    rules: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> str:
    """Trains on a disk that fails at one place and returns how that ended.

    A run that ends by an error is started again, as its message says, and then must have all.
    """
    caplog.clear()
    disk = BadDisk(folder, kind=kind, at=at, count=COUNT)
    where, before = f"{kind} at {at}: {undisturbed.writes[at]}", CheckpointStore(folder / "checkpoints")
    ended, words = "completed", ""
    try:
        with disk.watched():
            summary = train(folder, rules)
    except (DiskError, CheckpointError) as error:
        ended = type(error).__name__
        words = str(error)
        newest = before.newest()  # raises if what was saved before is not whole
        assert newest is None or newest.state.clock.updates <= UPDATES
        summary = train(folder, rules)
    assert ended == "completed" or "must" in words, where
    assert all(record.exc_info is None for record in caplog.records), f"{where}: a traceback"
    assert summary.status is RunStatus.COMPLETED, where
    assert summary.final_state_sha256 == undisturbed.summary.final_state_sha256, where
    assert repeatable_rows(folder) == undisturbed.rows, where
    assert evaluations(folder) == undisturbed.records, where
    assert json.loads((folder / "report.json").read_text())["status"] == "completed", where
    assert (folder / "export" / "diffusion_pytorch_model.safetensors").is_file(), where
    if kind == "full":  # on other disks what failed cannot be deleted either
        assert leftovers(folder) == [], where
    assert sum(record.message.startswith("not_written") for record in caplog.records) <= COUNT, where
    return ended


def sweep(
    folder: Path,
    undisturbed: Undisturbed,
    places: range,
    *,
    kind: str,
    rules: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> dict[str, int]:
    ends: dict[str, int] = {}
    with caplog.at_level(logging.WARNING):
        for at in places:
            ended = require_survived(
                folder / f"run_{at}", undisturbed, kind=kind, at=at, rules=rules, caplog=caplog
            )
            ends[ended] = ends.get(ended, 0) + 1
    return ends


def test_the_writes_are_those_that_are_known(undisturbed: Undisturbed) -> None:
    """What is written anew belongs into the table of the guide, and into one of its rules."""
    kinds = {path.partition("/")[0].partition(".tmp")[0] for _, path in undisturbed.writes}
    kinds = {".".join(name.split(".")[:2]) if name.split(".")[-1].isdigit() else name for name in kinds}
    assert kinds == {
        "",  # the folder itself
        ".lock",
        ".unfinished",
        "EVALUATE",  # a request, taken away
        "checkpoints",
        "config.yaml",
        "environment.json",
        "evaluations.jsonl",
        "export",
        "metrics.jsonl",
        "plan.json",
        "report.html",
        "report.json",
        "report.md",
        "samples",
        "start.json",
    }


@pytest.mark.parametrize("kind", ["full", "gone"])
@pytest.mark.parametrize("rules", [GO_ON, STOP], ids=["go_on", "stop"])
def test_some_writes_fail(
    tmp_path: Path,
    undisturbed: Undisturbed,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    rules: dict[str, str],
) -> None:
    total = len(undisturbed.writes)
    places = range(3 if kind == "full" else 5, total, max(1, total // 4))
    ends = sweep(tmp_path, undisturbed, places, kind=kind, rules=rules, caplog=caplog)
    assert sum(ends.values()) == len(places)
    if rules is GO_ON:
        assert ends["completed"] > 0
    else:
        assert ends.get("completed", 0) < len(places)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ERRNOS)
@pytest.mark.parametrize("rules", [GO_ON, STOP], ids=["go_on", "stop"])
def test_every_write_fails(
    tmp_path: Path,
    undisturbed: Undisturbed,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    rules: dict[str, str],
) -> None:
    places = range(len(undisturbed.writes))
    ends = sweep(tmp_path, undisturbed, places, kind=kind, rules=rules, caplog=caplog)
    assert ends["DiskError"] > 0
    if rules is GO_ON:
        assert ends["completed"] > sum(ends.values()) / 2


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["full", "failing"])
def test_the_best_whose_save_failed_is_not_the_best(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    asynchronous: bool,
) -> None:
    """The error of flicker rises from the evaluation at 2 to that at 4, so the first is the best: its save
    fails, and the second must be saved as the best of those that are left."""

    def write(folder: Path, captured: Any) -> Any:
        if "update_000002" in str(folder):
            raise OSError(ERRNOS[kind], "no")
        return write_shards(folder, captured)

    monkeypatch.setattr(saver, "write_shards", write)
    rule = {"metric": "flicker_error", "mode": "min"}
    checkpoint = {"every_updates": 100, "keep_last": 1, "keep_best": rule, "asynchronous": asynchronous}
    with caplog.at_level(logging.INFO):
        summary = train(tmp_path, GO_ON, updates=6, checkpoint=checkpoint)
    values = [record.metrics["flicker_error"] for record in read_evaluations(tmp_path)]
    assert values[1] < values[2], "else this test shows nothing"
    assert [save["update"] for save in summary.not_saved] == [2]
    saved = [record.args for record in caplog.records if record.msg.startswith("checkpoint_committed")]
    assert [arguments[0] for arguments in saved if isinstance(arguments, tuple)] == [4, 6]


def test_a_damaged_line_is_named_and_a_torn_last_one_is_repaired(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    copy = tmp_path / "copy"
    copy_as_if_stopped_at(2, undisturbed.folder, copy)
    path = copy / "evaluations.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("\0" * 20 + "\n" + "".join(rest) + first[:30])
    with pytest.raises(DataError, match=r"evaluations\.jsonl:1: must be .* Delete this line, which loses"):
        train(copy, GO_ON)
    path.write_text("".join(rest) + first[:30])
    assert train(copy, GO_ON).final_state_sha256 == undisturbed.summary.final_state_sha256
    assert evaluations(copy) == undisturbed.records[1:]


@pytest.mark.parametrize("torn", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_line_that_a_kill_cut_short_is_repaired_by_a_resume(
    tmp_path: Path, undisturbed: Undisturbed, torn: str
) -> None:
    copy = tmp_path / "copy"
    copy_as_if_stopped_at(2, undisturbed.folder, copy)
    with (copy / torn).open("a") as file:
        file.write('{"update": 3, "lo')
    train(copy, GO_ON)
    assert repeatable_rows(copy) == undisturbed.rows
    assert evaluations(copy) == undisturbed.records


def test_an_export_that_is_not_written_ends_the_run_and_the_next_start_writes_it(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    at = next(at for at, (_, path) in enumerate(undisturbed.writes) if path.startswith("export"))
    disk = BadDisk(tmp_path / "run", at=at, count=1000)
    with disk.watched(), pytest.raises(DiskError, match="must take export at the end of the run"):
        train(tmp_path / "run", GO_ON)
    assert not (tmp_path / "run" / "export").exists()
    assert train(tmp_path / "run", GO_ON).final_state_sha256 == undisturbed.summary.final_state_sha256
    assert (tmp_path / "run" / "export" / "diffusion_pytorch_model.safetensors").is_file()
