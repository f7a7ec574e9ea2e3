"""Evaluations inside phases: when they are made, what they leave, and that training does not notice."""

from __future__ import annotations

import errno
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.metrics.evaluations import (
    FILE,
    EvaluationRecord,
    Medium,
    append_evaluation,
    read_evaluations,
)
from aiprod_ds.report.summary import RunStatus, RunSummary
from aiprod_ds.testing.runs import repeatable_rows, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train import interrupts
from aiprod_ds.train.kept_media import drop_later_evaluations, kept_numbers, thin_media
from aiprod_ds.trainers.video_vae import VideoVAETrainer

FIRST, SECOND = 5, 4  # updates of the phases
NUM_CLIPS = 4
ONLY = {
    "name": "only",
    "updates": 3,
    "global_batch_size": 2,
    "resolution": "16x16",
    "duration": {"frames": 5},
    "learning_rate": 1e-2,
}
LENGTHS = NUM_CLIPS  # reads before anything else, of every clip, to learn its length


class Watched(Dataset[Tensor]):
    """Held-out clips; every read of one that is measured first does `act`."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self._clips = _clips(1)
        self._act = act
        self._reads = -LENGTHS

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Tensor:
        if self._reads >= 0:
            self._act(self._reads)
        self._reads += 1
        return self._clips[index]


class PowerCutError(BaseException):
    """Stands for whatever ends a process in the middle of a run; no error of a clip."""


@pytest.fixture(autouse=True)
def _group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interrupts, "LOOK_SECONDS", 0.0)
    dist.initialize()
    with without_plots():
        yield
    dist.shutdown()


def _clips(seed: int) -> SyntheticVideoDataset:
    return SyntheticVideoDataset(num_clips=NUM_CLIPS, frames=5, height=16, width=16, seed=seed)


def _train(folder: Path, *, evaluation: Any = None, validation: Any = None, **sections: Any) -> RunSummary:
    phase = {"resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-2}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0, "kl_weight": 1e-3},
        "curriculum": {
            "phases": [
                {"name": "first", "updates": FIRST, "global_batch_size": 2, **phase},
                {"name": "second", "updates": SECOND, "global_batch_size": 4, **phase},
            ]
        },
        "engine": {"kind": "local", "deepspeed_config": {}},
        "checkpoint": {"every_updates": 3},
        "evaluation": {"max_clips": 2, "num_pictures": 1, **(evaluation or {})},
        "ema": {"half_life_samples": 8},
        "report": {"flush_updates": 4},
        **sections,
    }
    torch.manual_seed(0)
    trainer = VideoVAETrainer(
        VAETrainerConfig.model_validate(values),
        model=TinyVideoVAE(),
        dataset=_clips(0),
        validation=validation or _clips(1),
    )
    return trainer.train()


def _places(folder: Path) -> list[tuple[int, str]]:
    return [(record.update, record.reason) for record in read_evaluations(folder)]


def _without_time(folder: Path) -> list[EvaluationRecord]:
    return [replace(record, seconds=0.0) for record in read_evaluations(folder)]


ENDS = [(5, "phase_end"), (9, "phase_end")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, []),
        ({"every_updates": 2}, [2, 4, 6, 8]),
        # 2 4 6 8 10 | 14 18 22 26 clips: 6 is reached, 12 passed, 18 reached; 24 falls on the end
        ({"every_samples": 6}, [3, 6, 7]),
        ({"every_updates": 4, "every_samples": 18}, [4, 7, 8]),
    ],
)
def test_evaluations_are_where_the_intervals_say_and_leave_no_trace_in_training(
    tmp_path: Path, plain: tuple[str, list[Any]], evaluation: dict[str, int], expected: list[int]
) -> None:
    summary = _train(tmp_path / "run", evaluation=evaluation)
    wanted = sorted([(0, "before"), *((update, "interval") for update in expected), *ENDS])
    assert _places(tmp_path / "run") == wanted
    assert (summary.final_state_sha256, _trained_rows(tmp_path / "run")) == plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """State and rows of a run that evaluates between its phases alone."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    dist.initialize()
    with without_plots():
        digest = _train(folder).final_state_sha256
    assert digest is not None
    return digest, _trained_rows(folder)


def _trained_rows(folder: Path) -> list[Any]:
    return [row for row in repeatable_rows(folder) if "loss/total" in row[1]]


@pytest.mark.slow
def test_whatever_an_evaluation_draws_training_draws_the_same(
    tmp_path: Path, plain: tuple[str, list[Any]]
) -> None:
    def draw(read: int) -> None:
        if read < 2 * 10:  # those of the evaluations; more follow for the latents' statistics
            random.random()
            np.random.random()
            torch.rand(1)

    random.seed(0)
    np.random.seed(0)
    summary = _train(tmp_path, evaluation={"every_updates": 1}, validation=Watched(draw))
    assert summary.final_state_sha256 == plain[0]
    found = random.random(), float(np.random.random())
    random.seed(0)
    np.random.seed(0)
    assert found == (random.random(), float(np.random.random()))


@pytest.mark.slow
def test_the_time_of_evaluations_is_not_trainings(tmp_path: Path) -> None:
    def wait(_: int) -> None:
        time.sleep(0.25)

    summary = _train(tmp_path, evaluation={"every_updates": 2}, validation=Watched(wait))
    evaluations = 2 * 0.25 * 7
    assert summary.time_seconds["evaluation"] >= evaluations
    assert sum(phase.seconds for phase in summary.phases) < evaluations, "9 updates of some milliseconds"
    assert sum(record.seconds for record in read_evaluations(tmp_path)) >= evaluations


@pytest.mark.slow
def test_a_record_says_what_was_measured_and_names_the_files(tmp_path: Path) -> None:
    _train(tmp_path, evaluation={"every_updates": 4, "num_pictures": 2})
    record = next(record for record in read_evaluations(tmp_path) if record.update == 4)
    assert (record.reason, record.phase, record.samples, record.is_average) == ("interval", "first", 8, True)
    assert record.clips == ("validation[0]", "validation[1]")
    assert {"psnr_db", "ssim"} <= set(record.metrics)
    assert [(medium.path, medium.kind, medium.role, medium.clip) for medium in record.media] == [
        ("samples/update_000004.png", "picture", "sheet", None),
        ("samples/original_clip_1.mp4", "film", "original", 1),
        ("samples/update_000004_clip_1.mp4", "film", "reconstruction", 1),
        ("samples/original_clip_2.mp4", "film", "original", 2),
        ("samples/update_000004_clip_2.mp4", "film", "reconstruction", 2),
    ]
    assert record.media[0].caption == f"update 4: {record.headline}"
    assert record.media[2].caption == "clip 1, update 4", "the measure is the mean of both clips"
    assert {medium.source for medium in record.media} == {"", "validation[0]", "validation[1]"}
    assert all((tmp_path / medium.path).stat().st_size for medium in record.media)


@pytest.mark.slow
def test_a_run_goes_on_without_room_for_films_and_over_a_damaged_record(
    tmp_path: Path, plain: tuple[str, list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """While the evaluation at 2 reads its clips, a file takes the place of their folder; a line is lost."""

    def damage(read: int) -> None:
        if read == 2:
            (tmp_path / "samples").rename(tmp_path / "elsewhere")
            (tmp_path / "samples").touch()
            (tmp_path / FILE).write_text("\0\0\0\n", encoding="utf-8")

    summary = _train(tmp_path, evaluation={"every_updates": 2}, validation=Watched(damage))
    assert summary.final_state_sha256 == plain[0]
    assert "not_written what=samples" in caplog.text
    assert "media_not_thinned" in caplog.text
    records = [json.loads(line) for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()[1:]]
    assert [record["update"] for record in records] == [2, 4, 5, 6, 8, 9]
    assert all(record["metrics"] and not record["media"] for record in records)


@pytest.mark.slow
def test_a_disk_that_is_full_inside_a_film_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the evaluation at 2 on the original's film is cut off in its middle."""
    write, originals = Path.write_bytes, []

    def write_some(path: Path, data: bytes) -> int:
        if path.name == "original_clip_1.mp4":
            originals.append(data)
            if len(originals) > 1:
                write(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_some)
    summary = _train(tmp_path, evaluation={"every_updates": 2}, curriculum={"phases": [ONLY]})
    assert summary.status is RunStatus.COMPLETED
    assert len(originals) == 3, "before, at 2, at the end"
    assert (tmp_path / "samples" / "original_clip_1.mp4").read_bytes() == originals[0]
    assert [record.update for record in read_evaluations(tmp_path) if not record.media] == [2, 3]
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"before.png", "before_clip_1.mp4", "original_clip_1.mp4"}
    assert not (tmp_path / ".unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cut_at", [2, 5, 6, 7])
def test_a_resumed_run_evaluates_where_an_uninterrupted_one_does(tmp_path: Path, cut_at: int) -> None:
    """Checkpoints stand at 3, 5 (edge), 6 and 9, evaluations at 0, 2, 4, 5, 6, 8 and 9 (two clips each)."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluation = {"every_updates": 2}
    expected = _train(whole, evaluation=evaluation)

    def lose_power(read: int) -> None:
        if read == 2 * cut_at - 4 + 1:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        _train(cut, evaluation=evaluation, validation=Watched(lose_power))
    found = _train(cut, evaluation=evaluation)
    assert found.final_state_sha256 == expected.final_state_sha256
    assert repeatable_rows(cut) == repeatable_rows(whole)
    assert _without_time(cut) == _without_time(whole)


@pytest.mark.slow
@pytest.mark.parametrize("update", [0, 2, 4, 9])
def test_a_stop_leaves_the_evaluation_which_is_made_after_the_resume(tmp_path: Path, update: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    evaluation = {"every_updates": 2}
    expected = _train(whole, evaluation=evaluation)
    number = {0: 0, 2: 1, 4: 2, 9: 6}[update]

    def stop(read: int) -> None:
        if read == 2 * number:
            (stopped / "STOP").touch()

    summary = _train(stopped, evaluation=evaluation, validation=Watched(stop))
    assert (summary.status, summary.updates) == (RunStatus.INTERRUPTED, update)
    assert update not in {record.update for record in read_evaluations(stopped)}
    assert not (stopped / "STOP").exists()
    found = _train(stopped, evaluation=evaluation)
    assert found.final_state_sha256 == expected.final_state_sha256
    assert repeatable_rows(stopped) == repeatable_rows(whole)
    assert _without_time(stopped) == _without_time(whole)


@pytest.mark.slow
def test_a_file_asks_for_an_evaluation_once(tmp_path: Path, plain: tuple[str, list[Any]]) -> None:
    def ask(read: int) -> None:
        if read == 1:
            (tmp_path / "EVALUATE").touch()  # while the run starts: done before the first update

    summary = _train(tmp_path, validation=Watched(ask), evaluation={"every_updates": 3})
    places = _places(tmp_path)
    assert [reason for _, reason in places].count("asked") == 0, "just evaluated at update 0"
    assert not (tmp_path / "EVALUATE").exists()
    assert summary.final_state_sha256 == plain[0]


@pytest.mark.slow
def test_an_evaluation_that_was_asked_for_inside_a_phase(
    tmp_path: Path, plain: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointStore.commit

    def ask(store: CheckpointStore, updates: int, *rest: Any, **named: Any) -> Path:
        if updates == 3:
            (tmp_path / "EVALUATE").touch()
        return real(store, updates, *rest, **named)

    monkeypatch.setattr(CheckpointStore, "commit", ask)
    summary = _train(tmp_path)
    asked = [update for update, reason in _places(tmp_path) if reason == "asked"]
    assert asked in ([3], [4])
    assert (tmp_path / f"samples/update_{asked[0]:06d}.png").is_file()
    assert not (tmp_path / "EVALUATE").exists()
    assert summary.final_state_sha256 == plain[0]


@pytest.mark.slow
def test_the_best_of_all_evaluations_is_kept_wherever_it_was_found(tmp_path: Path) -> None:
    rule = {"metric": "psnr_db", "mode": "max"}
    _train(
        tmp_path,
        evaluation={"every_updates": 1},
        checkpoint={"every_updates": 100, "keep_last": 1, "keep_best": rule},
    )
    measured = {record.update: record.metrics["psnr_db"] for record in read_evaluations(tmp_path)[1:]}
    best = max(measured, key=lambda update: (measured[update], -update))
    names = {f"update_{best:06d}", "update_000009"}
    assert set(CheckpointStore(tmp_path / "checkpoints").names()) == names


@pytest.mark.slow
def test_only_some_evaluations_inside_phases_keep_their_media(tmp_path: Path) -> None:
    _train(tmp_path, evaluation={"every_updates": 1, "keep_media": 3})
    records = read_evaluations(tmp_path)
    assert [record.update for record in records] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    # Inside phases 1 2 3 4 6 7 8 are numbers 0 to 6.
    with_media = {record.update for record in records if record.media}
    assert with_media == {0, 5, 9} | {1, 6, 8}
    thinned = {record.update: record.thinned for record in records if record.thinned}
    assert thinned == {2: 3, 3: 3, 4: 3, 7: 3}
    named = {medium.path for record in records for medium in record.media}
    assert {f"samples/{path.name}" for path in (tmp_path / "samples").iterdir()} == named


@pytest.mark.parametrize(
    ("count", "keep", "kept"),
    [
        (0, 4, set()),
        (1, 4, {0}),
        (4, 4, {0, 1, 2, 3}),
        (5, 4, {0, 2, 4}),
        (11, 4, {0, 4, 8, 10}),
        (13, 4, {0, 4, 8, 12}),
        (14, 4, {0, 8, 13}),
        (9, 2, {0, 8}),
        (9, 1, {8}),
    ],
)
def test_what_is_kept_is_spread_evenly(count: int, keep: int, kept: set[int]) -> None:
    """Written out by hand."""
    assert kept_numbers(count, keep) - {-1} == kept


@pytest.mark.parametrize("keep", [1, 2, 3, 16])
def test_what_is_kept_of_many_was_kept_of_few_and_is_never_more_than_asked(keep: int) -> None:
    alive: set[int] = set()
    for count in range(1, 200):
        alive.add(count - 1)
        wanted = kept_numbers(count, keep)
        assert wanted <= alive
        assert len(wanted) <= keep
        alive &= wanted


def _shown(folder: Path, update: int, reason: Any = "interval") -> None:
    (folder / "samples").mkdir(exist_ok=True)
    paths = [f"samples/{update}.png", "samples/original_clip_1.mp4"]
    for path in paths:
        (folder / path).touch()
    media = (
        Medium(path=paths[0], kind="picture", role="sheet", caption=""),
        Medium(path=paths[1], kind="film", role="original", caption="", clip=1),
    )
    append_evaluation(
        folder,
        EvaluationRecord(
            update=update,
            samples=0,
            phase="a",
            phase_index=0,
            reason=reason,
            seconds=0.0,
            metrics={},
            media=media,
        ),
    )


def test_evaluations_after_the_checkpoint_go_with_their_files_but_not_the_originals(tmp_path: Path) -> None:
    for update in 1, 2, 3:
        _shown(tmp_path, update)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"update": 4, "sam')  # cut short by a kill
    drop_later_evaluations(tmp_path, count=5)
    assert len((tmp_path / FILE).read_text().splitlines()) == 3
    assert len(read_evaluations(tmp_path)) == 3
    drop_later_evaluations(tmp_path, count=1)
    assert [record.update for record in read_evaluations(tmp_path)] == [1]
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["1.png", "original_clip_1.mp4"]


def test_of_a_file_that_lacks_a_record_no_later_one_stays(tmp_path: Path) -> None:
    """The disk did not take the second of the three that the checkpoint counts."""
    for update in 1, 3, 4:
        _shown(tmp_path, update)
    drop_later_evaluations(tmp_path, count=3, last_update=3)
    assert [record.update for record in read_evaluations(tmp_path)] == [1, 3]


def test_evaluations_before_training_and_between_phases_are_not_counted(tmp_path: Path) -> None:
    _shown(tmp_path, 0, "before")
    for update in 1, 2, 3:
        _shown(tmp_path, update)
        thin_media(tmp_path, keep=2)
    _shown(tmp_path, 4, "phase_end")
    thin_media(tmp_path, keep=2)
    assert [record.update for record in read_evaluations(tmp_path) if record.media] == [0, 1, 3, 4]
