"""Whole runs with trackers: training notices neither those that take media nor those that break or hang."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.metrics.evaluations import EvaluationRecord, read_evaluations
from aiprod_ds.metrics.shown import named_media
from aiprod_ds.metrics.sinks import MirrorSink, OwnThreadSink, Sink
from aiprod_ds.report.summary import RunStatus
from aiprod_ds.testing.runs import record_of, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train import run_folder
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    with without_plots():
        yield
    dist.shutdown()


def _train(folder: Path, **report: Any) -> dict[str, Any]:
    phase = {"resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-2}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**phase, "name": "only", "updates": 4, "global_batch_size": 2}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "evaluation": {"every_updates": 2, "max_clips": 2, "num_pictures": 1},
        "report": report,
    }
    clips = [SyntheticVideoDataset(num_clips=4, frames=5, height=16, width=16, seed=seed) for seed in (0, 1)]
    config = VAETrainerConfig.model_validate(values)
    torch.manual_seed(0)
    trainer = VideoVAETrainer(config, model=TinyVideoVAE(), dataset=clips[0], validation=clips[1])
    summary = trainer.train()
    assert summary.status is RunStatus.COMPLETED
    return record_of(summary, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run without trackers."""
    with dist.process_group(), without_plots():
        return _train(tmp_path_factory.mktemp("alone") / "run")


def test_trackers_get_what_evaluations_show_and_training_is_the_same(
    alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    folder = tmp_path / "run"
    assert _train(folder, tensorboard=True, wandb={"mode": "offline"}) == alone
    wandb.teardown()

    evaluations = read_evaluations(folder)
    shown = {name: medium for one in evaluations for name, medium in named_media(one, folder).items()}
    assert {medium.kind for medium in shown.values()} == {"picture", "film"}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == set(shown)
    sheets = {event.step for event in events.Images("samples/sheet")}
    assert sheets == {one.update for one in evaluations}
    (run,) = (folder / "wandb").glob("offline-run-*/")
    kept = [path for path in (run / "files" / "media").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".png", ".mp4", ".json"}


class BrokenSink:
    """Raises, or hangs, in one of its calls."""

    def __init__(self, call: str, *, hangs: bool) -> None:
        self.call, self.hangs, self.let_go = call, hangs, threading.Event()

    def _do(self, call: str, *_: object) -> None:
        if call == self.call and self.hangs:
            self.let_go.wait(60)
        elif call == self.call:
            raise ConnectionError("no route")

    def log(self, update: int, metrics: Mapping[str, float]) -> None:
        self._do("log", update, metrics)

    def log_evaluation(self, record: EvaluationRecord, folder: Path) -> None:
        self._do("log_evaluation", record, folder)

    def close(self) -> None:
        self._do("close")


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
@pytest.mark.parametrize("call", ["log", "log_evaluation", "close"])
def test_a_tracker_that_breaks_or_hangs_costs_one_warning(
    alone: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    *,
    hangs: bool,
) -> None:
    broken = BrokenSink(call, hangs=hangs)

    def opened(*_: object, **__: object) -> Sink:
        return OwnThreadSink(MirrorSink(broken, name="tracker"), name="tracker", close_seconds=0.5)

    monkeypatch.setattr(run_folder, "open_wandb", opened)
    with caplog.at_level(logging.WARNING, logger="aiprod_ds.metrics.sinks"):
        assert _train(tmp_path / "run") == alone
    broken.let_go.set()
    warnings = [entry.getMessage() for entry in caplog.records if entry.name == "aiprod_ds.metrics.sinks"]
    assert len(warnings) == 1
    assert warnings[0].startswith("mirror=tracker ")
