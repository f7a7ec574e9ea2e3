"""The trainer on the local engine: the run folder, the report, and resume that repeats an uninterrupted run
bit for bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.reading import replacing
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.report.page.run_page import write_page
from aiprod_ds.report.plots import save_plots
from aiprod_ds.report.summary import RunStatus
from aiprod_ds.testing.runs import repeatable_rows
from aiprod_ds.train import interrupts as requests
from aiprod_ds.train import reporting
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = pytest.mark.slow

LOW_UPDATES, HIGH_UPDATES = 3, 2
ALL_UPDATES = LOW_UPDATES + HIGH_UPDATES
LENGTHS = 6  # reads before anything else, of every clip, to learn its length


class SmallVAE(nn.Module):
    """Causal in time with stride 2 in time and space."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(3, 8, kernel_size=(3, 2, 2), stride=2)
        self.up = nn.ConvTranspose3d(4, 3, kernel_size=2, stride=2)

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.down(F.pad(video_BCTHW, (0, 0, 0, 0, 2, 0))).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.up(latent)
        return decoded[:, :, 1:]


class PowerCutError(RuntimeError):
    """Stands for whatever ends a process in the middle of a run."""


class ActingDataset(Dataset[Tensor]):
    """The synthetic clips of `seed`; from the read after `items` on, every read first does `act`."""

    def __init__(self, seed: int, items: int, act: Callable[[], None]) -> None:
        self._clips = _clips(seed)
        self._left = items
        self._act = act

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Tensor:
        self._left -= 1
        if self._left < 0:
            self._act()
        return self._clips[index]


def _lose_power(*_: object, **__: object) -> None:
    raise PowerCutError


def _clips(seed: int = 0) -> SyntheticVideoDataset:
    return SyntheticVideoDataset(num_clips=6, frames=6, height=16, width=16, seed=seed)


def _trainer(
    folder: Path,
    *,
    precision: str = "fp32",
    dataset: Dataset[Tensor] | None = None,
    validation: Dataset[Tensor] | None = None,
    **sections: Any,
) -> VideoVAETrainer:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    low = {
        "name": "low",
        "resolution": "12x12",
        "duration": {"frames": 3},
        "updates": LOW_UPDATES,
        "learning_rate": 0.01,
    }
    high = {
        "name": "high",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "updates": HIGH_UPDATES,
        "learning_rate": 0.005,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {
            "phases": [
                {**low, "global_batch_size": 4, "micro_batch_size": 2, "warmup_updates": 1},
                {**high, "global_batch_size": 2},
            ]
        },
        "engine": {"kind": "local", "deepspeed_config": settings},
        "checkpoint": {"every_updates": 2},
        "evaluation": {"max_clips": 2, "num_pictures": 1},
        **sections,
    }
    torch.manual_seed(0)
    config = VAETrainerConfig.model_validate(values)
    return VideoVAETrainer(
        config, model=SmallVAE(), dataset=dataset or _clips(), validation=validation or _clips(seed=1)
    )


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Returns one entry per update that was trained; evaluations stand in rows of their own."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/total" in row]


def _losses(folder: Path) -> dict[int, float]:
    return {row["update"]: row["loss/total"] for row in _rows(folder)}


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    yield
    dist.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, with plots and a page, which others here do not make."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with (
        dist.process_group(),
        patch.object(reporting, "save_plots", save_plots),
        patch.object(reporting, "write_page", write_page),
    ):
        _trainer(folder).train()
    return folder


def test_the_report_says_what_was_done(whole: Path) -> None:
    report = _report(whole)
    assert (report["status"], report["updates"], report["planned_updates"]) == (
        "completed",
        ALL_UPDATES,
        ALL_UPDATES,
    )
    assert (report["world_size"], report["engine"], report["zero_stage"], report["precision"]) == (
        1,
        "local",
        0,
        "fp32",
    )
    keys = ("name", "updates", "resolution", "frames", "batch", "lr_max")
    assert [tuple(phase[key] for key in keys) for phase in report["phases"]] == [
        ("low", LOW_UPDATES, "12x12", 3, 4, 0.01),
        ("high", HIGH_UPDATES, "16x16", 5, 2, 0.005),
    ]
    assert all(phase["seconds"] > 0 for phase in report["phases"])
    assert {"psnr_db_before", "psnr_db_after", "ssim_before", "ssim_after"} <= set(report["metrics"])
    assert len(report["final_state_sha256"]) == 64
    assert "torch" in report["versions"]
    assert report["resumed_from"] == []
    assert (report["data"]["clips"], report["data"]["held_out_clips"]) == (6, 6)


def test_the_run_folder_is_complete(whole: Path) -> None:
    for name in (
        "config.yaml",
        "plan.json",
        "environment.json",
        "start.json",
        "report.md",
        "report.html",
        "plots/loss.png",
        "samples/before.png",
    ):
        assert (whole / name).stat().st_size > 0
    saved = sorted(path.name for path in (whole / "checkpoints").glob("update_*"))
    assert saved == [
        "update_000002",
        "update_000003",
        "update_000004",
        "update_000005",
    ]  # every 2, each edge, the end


def test_metrics_have_one_row_per_update(whole: Path) -> None:
    rows = _rows(whole)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["clock/phase"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["clock/samples"] for row in rows] == [4, 8, 12, 14, 16]


def test_the_export_holds_the_trained_weights(whole: Path) -> None:
    exported = load_file(whole / "export" / "diffusion_pytorch_model.safetensors")
    model = SmallVAE()
    model.load_state_dict(exported)
    torch.manual_seed(0)
    assert not torch.equal(model.down.weight, SmallVAE().down.weight)


def test_the_same_run_twice_is_bitwise_the_same(whole: Path, run_folder: Path) -> None:
    summary = _trainer(run_folder).train()
    assert summary.final_state_sha256 == _report(whole)["final_state_sha256"]
    assert _losses(run_folder) == _losses(whole)


def test_another_seed_is_another_run(whole: Path, run_folder: Path) -> None:
    assert _trainer(run_folder, seed=1).train().final_state_sha256 != _report(whole)["final_state_sha256"]


@pytest.mark.parametrize(
    "updates", [2, LOW_UPDATES, 4, ALL_UPDATES], ids=["middle", "edge", "second phase", "end"]
)
def test_resume_from_a_checkpoint_repeats_the_uninterrupted_run(
    whole: Path, run_folder: Path, updates: int
) -> None:
    checkpoint = whole / "checkpoints" / f"update_{updates:06d}"
    summary = _trainer(run_folder).train(resume=str(checkpoint))
    report, expected = _report(run_folder), _report(whole)
    assert summary.final_state_sha256 == expected["final_state_sha256"]
    assert report["metrics"] == expected["metrics"]
    assert [phase["updates"] for phase in report["phases"]] == [LOW_UPDATES, HIGH_UPDATES]
    assert report["resumed_from"] == [checkpoint.name]
    later = {update: loss for update, loss in _losses(whole).items() if update > updates}
    assert _losses(run_folder) == later


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_died_goes_on_where_it_was_saved(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacing, "WAITS_SECONDS", ())
    uninterrupted = _trainer(tmp_path / "whole", precision=precision).train()
    # 4 clips are read for each of the first updates: this dies in the third, after the save.
    with pytest.raises(DataError, match="PowerCutError"):
        _trainer(
            tmp_path / "died", precision=precision, dataset=ActingDataset(0, LENGTHS + 2 * 4 + 2, _lose_power)
        ).train()
    died = _report(tmp_path / "died")
    assert (died["status"], died["updates"], died["final_state_sha256"]) == ("failed", 2, None)
    assert "PowerCutError" in died["error"]
    assert {"psnr_db_before"} == {name for name in died["metrics"] if name.startswith("psnr")}, (
        "no phase has ended"
    )
    resumed = _trainer(tmp_path / "died", precision=precision).train()
    assert resumed.resumed_from == ("update_000002",)
    assert resumed.final_state_sha256 == uninterrupted.final_state_sha256
    assert _losses(tmp_path / "died") == _losses(tmp_path / "whole")
    assert len(_rows(tmp_path / "died")) == ALL_UPDATES


class _StopAtTheEdge(logging.Handler):
    """Asks the run to stop when a phase has ended and is not evaluated yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("phase_ends"):
            (self._folder / "STOP").touch()


@pytest.fixture
def stopped_at_the_edge(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Path:
    """The folder of a run that was asked to stop after the last update of its first phase, and saved before
    it was evaluated."""
    monkeypatch.setattr(requests, "LOOK_SECONDS", 0.0)
    asking, log = _StopAtTheEdge(run_folder), logging.getLogger("aiprod_ds.train.loop")
    caplog.set_level(logging.INFO, log.name)
    log.addHandler(asking)
    assert _trainer(run_folder).train().status is RunStatus.INTERRUPTED
    log.removeHandler(asking)
    assert _phase_metrics_saved(run_folder) == set()
    return run_folder


def _phase_metrics_saved(folder: Path) -> set[str]:
    newest = CheckpointStore(folder / "checkpoints").newest()
    assert newest is not None
    assert newest.state.clock.updates == LOW_UPDATES
    return set(newest.state.history["phase_metrics"])


@pytest.mark.parametrize(
    ("reads", "found"), [(0, set()), (1, {"low"})], ids=["the first clip", "the last clip"]
)
def test_a_stop_during_the_evaluation_of_a_phase_saves_what_it_found(
    stopped_at_the_edge: Path, whole: Path, reads: int, found: set[str]
) -> None:
    """Before every clip it looks whether to go on: after the last one it has all."""
    evaluated = ActingDataset(1, LENGTHS + reads, (stopped_at_the_edge / "STOP").touch)
    assert _trainer(stopped_at_the_edge, validation=evaluated).train().status is RunStatus.INTERRUPTED
    assert _phase_metrics_saved(stopped_at_the_edge) == found
    assert _trainer(stopped_at_the_edge).train().status is RunStatus.COMPLETED
    assert repeatable_rows(stopped_at_the_edge) == repeatable_rows(whole)


def test_an_evaluation_that_was_not_saved_stands_in_the_metrics_once(
    stopped_at_the_edge: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "commit", _lose_power)
        with pytest.raises(PowerCutError):
            _trainer(stopped_at_the_edge).train()
    assert _phase_metrics_saved(stopped_at_the_edge) == set()
    assert _trainer(stopped_at_the_edge).train().status is RunStatus.COMPLETED
    assert repeatable_rows(stopped_at_the_edge) == repeatable_rows(whole)


def test_resume_never_moves_the_old_run_aside(run_folder: Path) -> None:
    run_folder.mkdir()
    (run_folder / "precious.txt").write_text("kept")
    summary = _trainer(run_folder).train(resume="never")
    assert summary.resumed_from == ()
    assert (run_folder.with_name("run.1") / "precious.txt").read_text() == "kept"
    assert not (run_folder / "precious.txt").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 9}, "must be of the same configuration"),
        (
            {"engine": {"kind": "local", "deepspeed_config": {"bf16": {"enabled": True}}}},
            "must be of this run's precision, bf16, got fp32",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    whole: Path, run_folder: Path, sections: dict[str, Any], message: str
) -> None:
    trainer = _trainer(run_folder, **sections)
    with pytest.raises(ConfigError, match=message):
        trainer.train(resume=str(whole / "checkpoints" / "update_000002"))
    assert not run_folder.exists()


def test_held_out_clips_need_training_clips() -> None:
    with pytest.raises(ConfigError, match="VideoVAETrainer: validation has no effect without dataset"):
        VideoVAETrainer(_trainer(Path("unused")).config, model=SmallVAE(), validation=_clips())
