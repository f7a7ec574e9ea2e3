"""Runs that go wrong on purpose: they go back to before that, leave out what did it and end like a run that
never applied it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.errors import CheckpointError, SpikeError
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.testing.runs import repeatable_rows, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train import run as run_module
from aiprod_ds.train.loop import TrainingLoop
from aiprod_ds.train.reporting import final_state_sha256
from aiprod_ds.train.resume.saver import Saver
from aiprod_ds.train.spikes import going_back
from aiprod_ds.train.spikes.rollbacks import FILE, Rollbacks, read_rollbacks
from aiprod_ds.trainers.video_vae import VideoVAETrainer, VideoVAEUnit

pytestmark = pytest.mark.slow

LOW, HIGH = 24, 4
NAN, INF = math.nan, math.inf
WINDOW = (6, 7, 8)  # positions in the data of the first phase; a checkpoint stands at 4
EXTREME = 21  # once there is a baseline
ALL_BAD = {
    **{(0, position): NAN for position in WINDOW},
    (0, EXTREME): 100.0,
    **{(1, position): INF for position in range(3)},  # before the second phase has a checkpoint of its own
}


class PowerCutError(RuntimeError):
    """Stands for whatever ends a process."""


@contextmanager
def injected(factors: Mapping[tuple[int, int], float]) -> Iterator[None]:
    """Multiplies the losses of some updates, by phase and position in its data."""
    real = VideoVAEUnit.loss

    def loss(unit: VideoVAEUnit, engine: Any, batch: MicroBatch, phase: Any) -> LossTerms:
        terms = real(unit, engine, batch, phase)
        factor = factors.get((phase.index, batch.position), 1.0)
        return replace(terms, total=terms.total * factor)

    with patch.object(VideoVAEUnit, "loss", loss):
        yield


def train(
    folder: Path,
    factors: Mapping[tuple[int, int], float] | None = None,
    *,
    spikes: Mapping[str, Any] | None = None,
    rate_factor: float = 1.0,
    precision: Mapping[str, Any] | None = None,
    resume: str = "auto",
    **sections: Any,
) -> Any:
    low = {"name": "low", "resolution": "16x16", "duration": {"frames": 3}, "updates": LOW}
    high = {"name": "high", "resolution": "24x24", "duration": {"frames": 3}, "updates": HIGH}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "ema": {"half_life_samples": 20},
        "optimizer": {"adaptive_clip": {"warmup_updates": 3}},
        "curriculum": {
            "phases": [
                {**low, "global_batch_size": 4, "accumulation": 2, "learning_rate": 1e-3}
                | {"learning_rate_factor": rate_factor},
                {**high, "global_batch_size": 2, "learning_rate": 5e-4},
            ]
        },
        "engine": {
            "kind": "local",
            "deepspeed_config": {"zero_optimization": {"stage": 1}, **(precision or {})},
        },
        "checkpoint": {"every_updates": 4},
        "evaluation": {"max_clips": 1, "num_pictures": 0, "every_updates": 7},
        "spikes": {"baseline_updates": 32, "warmup_updates": 16, **(spikes or {})},
        **sections,
    }
    torch.manual_seed(0)
    trainer = VideoVAETrainer(
        VAETrainerConfig.model_validate(values),
        model=TinyVideoVAE(),
        dataset=SyntheticVideoDataset(10, 5, 24, 24),
        validation=SyntheticVideoDataset(1, 5, 24, 24, seed=1),
    )
    with without_plots(), injected(factors or {}):
        return trainer.train(resume=resume)


@pytest.fixture(scope="module")
def never_applied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The oracle: updates whose gradient is not finite are skipped, and nobody looks for spikes."""
    folder = tmp_path_factory.mktemp("never_applied") / "run"
    summary = train(folder, dict.fromkeys(ALL_BAD, NAN), spikes={"mode": "off"})
    assert summary.skipped_updates == len(ALL_BAD)
    assert summary.rollbacks == ()
    return {"sha256": summary.final_state_sha256, "rows": without_rollbacks(folder)}


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with three spikes, and what its engine held where a checkpoint was saved and where it began."""
    folder = tmp_path_factory.mktemp("rolled_back") / "run"
    saved: dict[int, str] = {}
    begun: list[tuple[int, str]] = []
    save, run = Saver.save, TrainingLoop.run

    def noted_save(saver: Saver, trained: Any, state: Any) -> None:
        saved[state.clock.updates] = final_state_sha256(trained.engine)
        save(saver, trained, state)

    def noted_run(loop: TrainingLoop) -> Any:
        begun.append((loop.clock.updates, final_state_sha256(loop.state.engine)))
        return run(loop)

    with patch.object(Saver, "save", noted_save), patch.object(TrainingLoop, "run", noted_run):
        summary = train(folder, ALL_BAD)
    return {"folder": folder, "summary": summary, "saved": saved, "begun": begun}


def without_rollbacks(folder: Path) -> list[Any]:
    return [
        [update, {name: value for name, value in row.items() if name != "clock/rollbacks"}]
        for update, row in repeatable_rows(folder)
    ]


def test_it_ends_like_a_run_that_never_applied_them(
    rolled_back: dict[str, Any], never_applied: dict[str, Any]
) -> None:
    assert rolled_back["summary"].final_state_sha256 == never_applied["sha256"]
    assert without_rollbacks(rolled_back["folder"]) == never_applied["rows"], "every update stands once"


def test_it_goes_back_to_the_newest_checkpoint_before_each_spike(rolled_back: dict[str, Any]) -> None:
    begun = rolled_back["begun"]
    assert [update for update, _ in begun] == [0, 4, 16, LOW]
    for update, sha256 in begun[1:]:
        assert sha256 == rolled_back["saved"][update], f"the parameters of the checkpoint of update {update}"


def test_report_metrics_and_file_have_the_rollbacks(rolled_back: dict[str, Any]) -> None:
    folder, summary = rolled_back["folder"], rolled_back["summary"]
    assert [
        (entry["phase"], entry["first_position"], entry["last_position"], entry["checkpoint"])
        for entry in summary.rollbacks
    ] == [
        ("low", 6, 8, "update_000004"),
        ("low", EXTREME, EXTREME, "update_000016"),
        ("high", 0, 2, f"update_{LOW:06d}"),
    ]
    assert all(entry["clips"] for entry in summary.rollbacks)
    assert "deviations above its median of" in summary.rollbacks[1]["reason"]
    started = json.loads((folder / "start.json").read_text())
    assert started["rollbacks"] == list(summary.rollbacks), "for the page of a run that goes on"
    text = (folder / "report.md").read_text()
    assert "### Rollbacks" in text
    assert "update_000016" in text
    rows = [(update, row) for update, row in repeatable_rows(folder) if "loss/total" in row]
    behind = {update: row.get("clock/rollbacks", 0.0) for update, row in rows}
    assert [behind[update] for update in (6, 7, 18, 19, LOW, LOW + 1)] == [0, 1, 1, 2, 2, 3]
    assert [entry.window for entry in read_rollbacks(folder).decided] == [
        (0, 6, 8), (0, EXTREME, EXTREME), (1, 0, 2),
    ]  # fmt: skip


def _at_call(number: int) -> Callable[..., None]:
    calls = iter(range(1, 1000))

    def cut(*_: object, **__: object) -> None:
        if next(calls) == number:
            raise PowerCutError

    return cut


@contextmanager
def _cut(owner: Any, name: str, *, at: int, first: bool) -> Iterator[None]:
    """Cuts the power at a call of `owner.name`, before it does anything or once it is done."""
    real, cut = getattr(owner, name), _at_call(at)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if first:
            cut()
        result = real(*arguments, **named)
        if not first:
            cut()
        return result

    with patch.object(owner, name, wrapped):
        yield


_MOMENTS = {
    "before it is written down": (Rollbacks, "write", 1, True),
    "once it is written down": (Rollbacks, "write", 1, False),
    "in the second one once it is written down": (Rollbacks, "write", 2, False),
    "when what came later is deleted": (going_back, "delete_given_up", 2, False),
    "while the checkpoint is read": (run_module, "read_engine", 1, False),
    "while the data is left out": (TrainingLoop, "_pass_over", 2, False),
}


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            name,
            marks=()
            if name in ("once it is written down", "while the data is left out")
            else pytest.mark.exhaustive,
        )
        for name in _MOMENTS
    ],
)
def test_a_run_that_is_killed_on_its_way_back_ends_the_same(
    never_applied: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    owner, name, number, first = _MOMENTS[moment]
    with _cut(owner, name, at=number, first=first), pytest.raises(PowerCutError):
        train(tmp_path, ALL_BAD)
    summary = train(tmp_path, ALL_BAD)
    assert summary.final_state_sha256 == never_applied["sha256"]
    assert without_rollbacks(tmp_path) == never_applied["rows"]
    assert len(summary.rollbacks) == 3


def test_a_rise_is_taken_back_from_where_it_began_though_checkpoints_were_saved_in_it(tmp_path: Path) -> None:
    rise = {(0, position): 6.0 for position in (18, 19, 20)}
    checkpoint = {"every_updates": 1, "keep_last": 1}
    rules = {"sustained_updates": 3}
    summary = train(tmp_path / "rises", rise, spikes=rules, checkpoint=checkpoint)
    assert [(entry["first_position"], entry["last_position"]) for entry in summary.rollbacks] == [(18, 20)]
    assert summary.rollbacks[0]["checkpoint"] == "update_000018", "kept though two newer ones were saved"
    oracle = train(tmp_path / "oracle", dict.fromkeys(rise, NAN), spikes={"mode": "off"})
    assert summary.final_state_sha256 == oracle.final_state_sha256
    assert CheckpointStore(tmp_path / "rises" / "checkpoints").names() == [f"update_{LOW + HIGH:06d}"]


def test_the_budget_ends_in_a_diagnosis_that_can_be_followed(tmp_path: Path) -> None:
    bad = {(0, position): NAN for position in WINDOW}
    with pytest.raises(SpikeError) as stopped:
        train(tmp_path, bad, spikes={"max_rollbacks": 0})
    told = str(stopped.value)
    for words in (
        "phase low, update 6: the loss was nan, in 3 updates of the data",
        "learning rate of",
        "Its clips: ",
        "The checkpoint update_000004 stands before it.",
        "curriculum.phases[0].learning_rate_factor: 0.5",
    ):
        assert words in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "failed"
    assert report["error"].endswith(told)
    stopped_by = json.loads((tmp_path / FILE).read_text())["stopped_by"]
    assert stopped_by["num_clips"] == 12
    assert [values["loss"] for values in stopped_by["spike"]["values"]] == ["nan"] * 3

    rates = _rates(tmp_path)
    summary = train(tmp_path, spikes={"max_rollbacks": 0}, rate_factor=0.5)
    assert summary.resumed_from == ("update_000004",)
    assert summary.rate_factors == ({"phase": "low", "update": 4, "phase_update": 4, "factor": 0.5},)
    now = _rates(tmp_path)
    assert {update: now[update] for update in range(1, 5)} == {
        update: rates[update] for update in range(1, 5)
    }
    assert {update: now[update] for update in (5, 6)} == {update: rates[update] / 2 for update in (5, 6)}
    assert now[LOW + 1] == 5e-4, "of the phase alone"
    assert [phase.lr_max for phase in summary.phases] == [1e-3, 5e-4]


def test_more_than_the_budget_stops_and_another_factor_begins_to_count_anew(tmp_path: Path) -> None:
    bad = {(0, position): NAN for position in (2, 3, 4, 6, 7, 8)}
    with pytest.raises(SpikeError, match="the run has gone back 1 times already"):
        train(tmp_path, bad, spikes={"max_rollbacks": 1}, checkpoint={"every_updates": 1})
    summary = train(
        tmp_path, bad, spikes={"max_rollbacks": 1}, checkpoint={"every_updates": 1}, rate_factor=0.5
    )
    assert [entry["first_position"] for entry in summary.rollbacks] == [2, 6]


def _rates(folder: Path) -> dict[int, float]:
    return {update: row["learning_rate"] for update, row in repeatable_rows(folder) if "loss/total" in row}


def test_without_a_checkpoint_before_it_the_same_program_begins_anew(tmp_path: Path) -> None:
    bad = {(0, position): NAN for position in (1, 2, 3)}
    with pytest.raises(
        SpikeError, match=r"its beginning, .* start the same program again, which leaves it out"
    ):
        train(tmp_path / "run", bad)
    summary = train(tmp_path / "run", bad)
    oracle = train(tmp_path / "oracle", bad, spikes={"mode": "off"})
    assert summary.final_state_sha256 == oracle.final_state_sha256
    assert summary.rollbacks[0]["checkpoint"] is None


def test_a_loss_scale_that_looks_for_its_height_is_no_spike_and_is_taken_back_with_one(
    tmp_path: Path,
) -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 2, "loss_scale_window": 5}}
    bad = {(0, position): NAN for position in (40, 41, 42)}
    summary = train(tmp_path / "whole", bad, precision=fp16)
    rows = [row for _, row in repeatable_rows(tmp_path / "whole") if "loss/total" in row]
    assert rows[0]["clock/skipped_updates"] > 3, "more in a row than a spike has"
    assert [entry["first_position"] for entry in summary.rollbacks] == [40]
    with _cut(Rollbacks, "write", at=1, first=False), pytest.raises(PowerCutError):
        train(tmp_path / "killed", bad, precision=fp16)
    killed = train(tmp_path / "killed", bad, precision=fp16)
    assert killed.final_state_sha256 == summary.final_state_sha256
    assert repeatable_rows(tmp_path / "killed") == repeatable_rows(tmp_path / "whole")


def test_a_damaged_file_of_rollbacks_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 1, "rollbacks": [{"spike": 3}]}')
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: must hold the run's rollbacks in format 1"):
        train(tmp_path)


def test_a_checkpoint_that_was_given_up_can_be_named_and_the_run_stays_on_its_way(tmp_path: Path) -> None:
    rise = {(0, position): 6.0 for position in (18, 19, 20)}
    rules: dict[str, Any] = {"spikes": {"sustained_updates": 3}, "checkpoint": {"every_updates": 1}}
    with _cut(going_back, "delete_given_up", at=2, first=True), pytest.raises(PowerCutError):
        train(tmp_path, rise, **rules)
    doubtful = tmp_path / "checkpoints" / "update_000020"
    assert CheckpointStore(doubtful.parent).read(doubtful).state.is_doubtful
    with _cut(TrainingLoop, "_update", at=2, first=True), pytest.raises(PowerCutError):
        train(tmp_path, resume=str(doubtful), **rules)
    assert read_rollbacks(tmp_path).decided == ()
    summary = train(tmp_path, **rules)
    assert summary.resumed_from == ("update_000020", "update_000021")
    assert summary.rollbacks == ()
