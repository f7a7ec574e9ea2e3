"""Whole training runs on files of which some are damaged behind their header: they finish, name the files,
and go on bit for bit after a resume, with any number of workers and on one and two ranks."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.reading import replacing
from aiprod_ds.data.synthetic import SyntheticVideoDataset, write_synthetic_clips
from aiprod_ds.engine import dist
from aiprod_ds.errors import DataError
from aiprod_ds.metrics.evaluations import read_evaluations
from aiprod_ds.report.summary import RunSummary
from aiprod_ds.testing.runs import alike_on_ranks, record_of, train_and_resume, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

CLIPS, BATCH, EVERY = 48, 8, 3
PASS = CLIPS // BATCH  # updates that read every clip once
DAMAGED = "clip_00007.mp4"
DECODED = "must be a decodable video, got: "

pytestmark = [pytest.mark.slow]


def damage_behind_the_header(path: Path) -> None:
    """Changes half of what stands between the boxes, so that the file is as good as before to look at."""
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    end = content.index(b"moov") if b"moov" in content[begin:] else len(content)
    for place in range(begin + (end - begin) // 3, end - (end - begin) // 6):
        content[place] ^= 0x5A
    path.write_bytes(content)


def write_clips(folder: Path, *, damaged: int) -> None:
    write_synthetic_clips(folder / "train", num_clips=CLIPS, frames=9, height=32, width=32, seed=1)
    write_synthetic_clips(folder / "validation", num_clips=3, frames=9, height=32, width=32, seed=2)
    for number in range(damaged):
        damage_behind_the_header(folder / "train" / f"clip_{7 + 9 * number:05d}.mp4")


class ActingVAE(TinyVideoVAE):
    """Does something in the middle of some updates."""

    def __init__(self, actions: Mapping[int, Callable[[], None]]) -> None:
        super().__init__()
        self._actions = dict(actions)
        self._calls = 0

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not video_BCTHW.is_meta:
            self._calls += 1
            self._actions.pop(self._calls, _nothing)()
        return super().encode(video_BCTHW)


def _nothing() -> None:
    pass


def train(  # what a test may vary
    folder: Path,
    clips: Path,
    *,
    num_workers: int = 0,
    updates: int = 2 * PASS + 1,
    actions: Mapping[int, Callable[[], None]] | None = None,
    datasets: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> RunSummary:
    phase = {"learning_rate": 3e-3, "warmup_updates": 1, "global_batch_size": BATCH, "accumulation": 2}
    low = {"name": "low", "resolution": "16x16", "duration": {"frames": 5}, "updates": updates, **phase}
    high = {"name": "high", "resolution": "24x24", "duration": {"frames": 9}, "updates": 2, **phase}
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {
                "train": str(clips / "train"),
                "validation": str(clips / "validation"),
                "num_workers": num_workers,
                **(data or {}),
            },
            "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3, "haar_weight": 0.1},
            "curriculum": {"phases": [low, high]},
            "engine": {"kind": "local" if dist.world_size() == 1 else "deepspeed", **_settings()},
            "checkpoint": {"every_updates": EVERY, "keep_last": 20},
            "evaluation": {"max_clips": 3, "num_pictures": 0},
            "report": {"flush_updates": 2},
        }
    )
    torch.manual_seed(0)
    model = ActingVAE(actions or {})
    torch.manual_seed(len(folder.name))  # a resumed process stands elsewhere in torch's own stream
    return VideoVAETrainer(config, model=model, **(datasets or {})).train(resume="auto")


def _settings() -> dict[str, str]:
    configs = Path(__file__).parents[2] / "ds_configs"
    return {} if dist.world_size() == 1 else {"deepspeed_config": str(configs / "zero1_fp32.json")}


def listed(folder: Path) -> dict[str, dict[str, str]]:
    """Returns by checkpoint the bad clips in its state."""
    states = sorted(folder.glob("checkpoints/update_*/state.json"))
    return {path.parent.name: json.loads(path.read_text())["replaced_clips"] for path in states}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "WAITS_SECONDS", (0.001, 0.002))


@pytest.fixture(scope="module")
def one_damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = tmp_path_factory.mktemp("one_damaged")
    write_clips(clips, damaged=1)
    return clips


@pytest.fixture(scope="module")
def five_damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = tmp_path_factory.mktemp("five_damaged")
    write_clips(clips, damaged=5)
    return clips


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_clip_ends_nothing_and_changes_nothing_between_runs(
    world: int, one_damaged: Path, tmp_path: Path
) -> None:
    records = alike_on_ranks(run_whole_and_resumed, ranks=world, folder=tmp_path, clips=str(one_damaged))
    whole = records["whole"]
    [(name, reason)] = whole["replaced"]
    assert name == DAMAGED
    assert DECODED in reason
    found_by = min(update for update, clips in whole["listed"].items() if clips)
    assert found_by <= f"update_{PASS + EVERY:06d}"
    assert all(clips == {name: reason} for update, clips in whole["listed"].items() if update >= found_by)
    assert [
        metrics["data/replaced_clips"] for _, metrics in whole["rows"] if "data/replaced_clips" in metrics
    ]
    for case, record in records.items():
        assert record["sha256"] == whole["sha256"], case
        assert record["rows"] == whole["rows"], case
        assert record["replaced"] == whole["replaced"], case
        assert record["listed"] == whole["listed"], case


def run_whole_and_resumed(folder: str, clips: str) -> dict[str, Any]:
    """Runs on the ranks."""
    replacing.WAITS_SECONDS = (0.001, 0.002)
    own = Path(clips)

    def recorded(path: Path, num_workers: int) -> dict[str, Any]:
        summary = train(path, own, num_workers=num_workers)
        replaced = (
            json.loads((path / "report.json").read_text())["data"]["replaced"] if dist.is_main() else ()
        )
        pairs = [(entry["path"], entry["reason"]) for entry in dist.broadcast_object(replaced)]
        assert pairs == list(summary.data.replaced)
        return {**record_of(summary, path), "replaced": pairs, "listed": listed(path)}

    records = train_and_resume(
        lambda path: recorded(path, 0), Path(folder) / "run", {"early": EVERY, "late": 3 * EVERY}
    )
    others = train_and_resume(lambda path: recorded(path, 2), Path(folder) / "two", {"middle": 2 * EVERY})
    return {**records, **{f"two_workers_{name}": record for name, record in others.items()}}


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_above_the_limit_the_run_saves_and_stops_on_all_ranks(
    world: int, five_damaged: Path, tmp_path: Path
) -> None:
    found = alike_on_ranks(run_above_the_limit, ranks=world, folder=tmp_path, clips=str(five_damaged))
    assert found["message"].startswith(
        "data.train: at most 5% of the clips may be unreadable in training, got "
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "failed"
    assert report["error"] == f"DataError: {found['message']}"
    newest = CheckpointStore(tmp_path / "run" / "checkpoints").newest()
    assert newest is not None
    assert newest.state.clock.updates == report["updates"] > 0, "no update is lost"
    names = [f"clip_{number:05d}.mp4" for number in (7, 16, 25, 34, 43)]
    assert len(newest.state.replaced_clips) >= 3
    assert set(newest.state.replaced_clips) <= set(names)
    assert all(f"{name} (" in found["message"] for name in newest.state.replaced_clips)
    assert found["status_with_a_higher_limit"] == "completed"
    assert found["listed_in_the_end"] == names


def run_above_the_limit(folder: str, clips: str) -> dict[str, Any]:
    """Runs on the ranks."""
    replacing.WAITS_SECONDS = (0.001, 0.002)
    path = Path(folder) / "run"
    with without_plots():
        with pytest.raises(DataError) as stopped:
            train(path, Path(clips))
        resumed = path.with_name("resumed")
        dist.barrier()
        if dist.is_main():
            shutil.copytree(path, resumed)
        dist.barrier()
        summary = train(resumed, Path(clips), data={"max_unreadable_fraction": 0.2})
    return {
        "message": str(stopped.value),
        "status_with_a_higher_limit": summary.status.value,
        "listed_in_the_end": [name for name, _ in summary.data.replaced],
    }


def test_a_worker_that_is_killed_in_the_middle_of_an_update_changes_nothing(
    one_damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill_a_worker() -> None:
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)

    with without_plots(), caplog.at_level(logging.WARNING):
        whole = train(tmp_path / "whole", one_damaged)
        killed = train(
            tmp_path / "killed", one_damaged, num_workers=2, actions={5: kill_a_worker, 12: kill_a_worker}
        )
    assert killed.final_state_sha256 == whole.final_state_sha256
    assert (whole.worker_restarts, killed.worker_restarts) == (0, 2)
    assert caplog.text.count("loader_restarted") == 2
    assert (
        "Workers of the loader died and were started again: 2 times."
        in (tmp_path / "killed" / "report.md").read_text()
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_is_replaced(num_workers: int, tmp_path: Path) -> None:
    write_clips(tmp_path, damaged=0)
    gone = tmp_path / "train" / DAMAGED
    with without_plots():
        summary = train(tmp_path / "run", tmp_path, num_workers=num_workers, actions={1: gone.unlink})
    [(name, reason)] = summary.data.replaced
    assert name == DAMAGED
    assert "No such file" in reason
    assert f"| `{DAMAGED}` | " in (tmp_path / "run" / "report.md").read_text()


class Hiccups(SyntheticVideoDataset):
    """Fails for one clip and some time once it is told to."""

    failures = 0

    def __getitem__(self, index: int) -> Tensor:
        if index == 7 and type(self).failures:
            type(self).failures -= 1
            raise TimeoutError("the store does not answer")
        return super().__getitem__(index)


@pytest.mark.dist
def test_what_one_rank_could_not_read_is_replaced_on_all_from_the_checkpoint_on(tmp_path: Path) -> None:
    """The other rank could read it at any time: without the list in the checkpoint, the runs would part."""
    records = alike_on_ranks(run_with_hiccups, ranks=2, folder=tmp_path)
    assert {name for name, _ in records["whole"]["replaced"]} == {"dataset[7]"}
    assert records["resumed"]["sha256"] == records["whole"]["sha256"]
    assert records["resumed"]["rows"] == records["whole"]["rows"]
    assert records["undisturbed"]["sha256"] != records["whole"]["sha256"]


def run_with_hiccups(folder: str) -> dict[str, Any]:
    """Runs on the ranks."""
    replacing.WAITS_SECONDS = (0.001, 0.002)

    def fail() -> None:
        Hiccups.failures = 3

    def recorded(path: Path) -> dict[str, Any]:
        Hiccups.failures = 0
        actions = {1: fail} if "undisturbed" not in path.name and dist.rank() == 1 else {}
        datasets = {
            "dataset": Hiccups(CLIPS, 9, 24, 24),
            "validation": SyntheticVideoDataset(3, 9, 24, 24, seed=1),
        }
        data = {"train": "unused", "validation": None}
        summary = train(path, Path(), actions=actions, datasets=datasets, data=data)
        return {**record_of(summary, path), "replaced": [list(pair) for pair in summary.data.replaced]}

    records = train_and_resume(recorded, Path(folder) / "run", {"resumed": 3 * EVERY})
    undisturbed = train_and_resume(recorded, Path(folder) / "undisturbed", {})
    return {**records, "undisturbed": undisturbed["whole"]}


def test_a_run_that_stopped_for_too_many_tries_them_again_when_it_is_resumed(tmp_path: Path) -> None:
    """The files were out of reach for a while, and are the same again."""
    write_clips(tmp_path, damaged=0)
    names = [f"clip_{number:05d}.mp4" for number in range(3, 9)]
    away = tmp_path / "away"
    away.mkdir()

    def go_away() -> None:
        for name in names:
            (tmp_path / "train" / name).rename(away / name)

    with without_plots():
        with pytest.raises(DataError, match="at most 5% of the clips may be unreadable in training"):
            train(tmp_path / "run", tmp_path, actions={1: go_away})
        for name in names:
            (away / name).rename(tmp_path / "train" / name)
        found = train(tmp_path / "run", tmp_path)
    assert found.status.value == "completed"
    assert found.data.replaced == ()


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_held_out_clip_that_cannot_be_read_is_left_out_by_name(world: int, tmp_path: Path) -> None:
    """Oracle: the same run without the file. On two ranks, the sums of the measures are added in another
    order."""
    write_clips(tmp_path, damaged=0)
    damage_behind_the_header(tmp_path / "validation" / "clip_00001.mp4")
    shutil.copytree(tmp_path / "train", tmp_path / "without" / "train")
    shutil.copytree(tmp_path / "validation", tmp_path / "without" / "validation")
    (tmp_path / "without" / "validation" / "clip_00001.mp4").unlink()
    found = alike_on_ranks(run_with_bad_validation, ranks=world, folder=tmp_path)
    assert found["damaged"]["metrics"] == pytest.approx(found["without"]["metrics"], rel=1e-12, abs=0)
    assert found["damaged"]["sha256"] == found["without"]["sha256"]
    records = read_evaluations(tmp_path / "run_damaged")
    assert [record.reason for record in records] == ["before", "phase_end", "phase_end"]
    for record in records:
        assert record.clips == ("clip_00000.mp4", "clip_00002.mp4")
        [entry] = record.not_judged
        assert (entry.clip, entry.measure) == ("clip_00001.mp4", "every measure")
        assert DECODED in entry.reason


def run_with_bad_validation(folder: str) -> dict[str, Any]:
    """Runs on the ranks."""
    replacing.WAITS_SECONDS = (0.001, 0.002)
    found = {}
    with without_plots():
        for name, clips in (("damaged", Path(folder)), ("without", Path(folder) / "without")):
            run = Path(folder) / f"run_{name}"
            summary = train(run, clips, updates=2)
            dist.barrier()
            statistics = json.loads((run / "export" / "latent_statistics.json").read_text())
            assert statistics["clips"] == 2
            found[name] = {"metrics": dict(summary.metrics), "sha256": summary.final_state_sha256}
    return found


def test_where_no_held_out_clip_can_be_read_any_more_training_goes_on(tmp_path: Path) -> None:
    write_clips(tmp_path, damaged=0)

    def lose_them() -> None:
        shutil.rmtree(tmp_path / "validation")

    with without_plots():
        summary = train(tmp_path / "run", tmp_path, updates=2, actions={1: lose_them})
    assert summary.status.value == "completed"
    before, *later = read_evaluations(tmp_path / "run")
    assert before.metrics
    for record in later:
        assert (record.metrics, record.clips) == ({}, ())
        assert record.headline == "no held-out clip could be read"
        assert [entry.clip for entry in record.not_judged] == [
            f"clip_{number:05d}.mp4" for number in range(3)
        ]
