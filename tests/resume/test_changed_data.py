"""Runs that are resumed on other data than they had: refused with what changed, by name, and nothing written;
accepted knowingly; and the same data in another place is no change.

One run of a tiny video VAE on files is the original. Each test copies its run folder, as a kill after the
second of four updates leaves it, and its clips, and changes the copy.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.checkpoint.manifest import MANIFEST
from aiprod_ds.cli import BAD_CONFIGURATION, DONE, main
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import write_synthetic_clips
from aiprod_ds.errors import ConfigError
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.runs import copy_as_if_stopped_at, repeatable_rows, without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.train.resume.data_change import CLIPS
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = [pytest.mark.slow]

STOPPED, LAST = 2, 4
CONFIG = """\
trainer: video_vae
output_dir: RUN
model: {source: "aiprod_ds.testing.tiny:TinyVideoVAE", spatial_stride: 4, temporal_stride: 2}
data: {train: CLIPS, num_workers: 0, holdout_fraction: 0.2}
loss: {perceptual_weight: 0.0}
curriculum:
  phases:
    - {name: only, resolution: 16x16, duration: {frames: 5}, global_batch_size: 2, updates: 4, learning_rate: 1.0e-3}
engine: {kind: local, deepspeed_config: {zero_optimization: {stage: 1}}}
checkpoint: {every_updates: 2}
evaluation: {max_clips: 1, num_pictures: 0}
"""  # noqa: E501


class Copy:
    """A run that was stopped, its clips, and how it goes on."""

    def __init__(self, folder: Path) -> None:
        self.run, self.clips, self.config = folder / "run", folder / "clips", folder / "config.yaml"

    def train(self, *options: str, data: Path | None = None, settings: tuple[str, ...] = ()) -> int:
        return self.call("train", *options, data=data, settings=settings)

    def call(
        self, command: str, *options: str, data: Path | None = None, settings: tuple[str, ...] = ()
    ) -> int:
        chosen = (f"data.train={data or self.clips}", *settings)
        parts = [part for setting in chosen for part in ("--set", setting)]
        with without_plots():
            return main(
                [command, str(self.config), "--trust-code", "--output-dir", str(self.run), *parts, *options]
            )

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return found

    def checkpoint(self, updates: int) -> Path:
        return self.run / "checkpoints" / f"update_{updates:06d}"

    def listed(self, updates: int) -> list[list[Any]]:
        text = gzip.decompress((self.checkpoint(updates) / CLIPS).read_bytes()).decode()
        return [json.loads(line) for line in text.splitlines()[1:]]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The run that nobody stopped."""
    copy = Copy(tmp_path_factory.mktemp("whole"))
    write_synthetic_clips(copy.clips, num_clips=10, frames=6, height=16, width=16, with_sound=False)
    copy.config.write_text(CONFIG.replace("CLIPS", "never_used").replace("RUN", "never_used"))
    assert copy.train() == DONE
    return copy


@pytest.fixture
def stopped(whole: Copy, tmp_path: Path) -> Copy:
    copy = Copy(tmp_path)
    copy_as_if_stopped_at(STOPPED, whole.run, copy.run)
    shutil.copytree(whole.clips, copy.clips)
    shutil.copy(whole.config, copy.config)
    return copy


def _trained_clip(copy: Copy, place: int) -> Path:
    """Returns one of the clips that are trained on, by its index."""
    names: list[str] = [name for part, name, *_ in copy.listed(STOPPED) if part == 0]
    return copy.clips / names[place]


def _add(copy: Copy) -> str:
    other = copy.run.parent / "other"
    write_synthetic_clips(other, num_clips=1, frames=6, height=16, width=16, seed=7, with_sound=False)
    shutil.move(other / "clip_00000.mp4", copy.clips / "a_new_one.mp4")
    return "training: 1 added (a_new_one.mp4); 9 of 9 indices stand for another clip"


def _lose(copy: Copy) -> str:
    clip = _trained_clip(copy, 1)
    clip.unlink()
    return f"training: 1 lost ({clip.name}); 7 of 8 indices stand for another clip"


def _alter(copy: Copy) -> str:
    clip = _trained_clip(copy, 2)
    content = clip.read_bytes()
    place = content.index(b"Lavf")  # the name of the program that wrote it: the clip stays readable
    clip.write_bytes(content[:place] + b"Lavg" + content[place + 4 :])
    assert clip.stat().st_size == len(content)
    return f"training: 1 altered ({clip.name}: another content)"


def _replace(copy: Copy) -> str:
    """With a clip of other content, size and length."""
    clip = _trained_clip(copy, 2)
    before, other = clip.stat().st_size, copy.run.parent / "other"
    write_synthetic_clips(other, num_clips=1, frames=12, height=16, width=16, seed=7, with_sound=False)
    shutil.move(other / "clip_00000.mp4", clip)
    return f"training: 1 altered ({clip.name}: {before} -> {clip.stat().st_size} bytes, frames 6 -> 12, "


def _rename(copy: Copy) -> str:
    clip = _trained_clip(copy, 0)
    clip.rename(clip.with_name("z.mp4"))
    return f"training: 1 renamed ({clip.name} -> z.mp4); 8 of 8 indices stand for another clip"


def _damage(copy: Copy) -> str:
    clip = _trained_clip(copy, 1)
    clip.write_bytes(b"\0" * 100)
    return f"training: 1 lost ({clip.name}: unreadable now: "


CHANGES = (_add, _lose, _alter, _replace, _rename, _damage)


def test_the_same_data_in_another_place_goes_on_bit_for_bit(whole: Copy, stopped: Copy) -> None:
    moved = stopped.clips.rename(stopped.clips.with_name("moved"))
    assert stopped.train(data=moved) == DONE
    assert stopped.report()["resumed_from"] == [f"update_{STOPPED:06d}"]
    assert stopped.report()["final_state_sha256"] == whole.report()["final_state_sha256"]
    assert stopped.report()["accepted_data"] == []
    assert repeatable_rows(stopped.run) == repeatable_rows(whole.run)
    assert stopped.listed(LAST) == stopped.listed(STOPPED) == whole.listed(LAST)


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_refused_by_name_and_nothing_is_written(
    stopped: Copy, change: Callable[[Copy], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = change(stopped)
    before = _contents(stopped.run)
    assert stopped.train(settings=("data.max_unreadable_fraction=0.2",)) == BAD_CONFIGURATION
    error = capsys.readouterr().err
    assert f"--resume {stopped.checkpoint(STOPPED)}: must go on with the data that the run had" in error
    assert words in error
    assert "--accept-changed-data" in error
    assert _contents(stopped.run) == before


def test_check_tells_beforehand(stopped: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped.call("check") == DONE
    assert "other data" not in capsys.readouterr().err
    words = _add(stopped)
    assert stopped.call("check") == DONE
    shown = " ".join(capsys.readouterr().err.split())
    assert f"warning: update_{STOPPED:06d} of the run in" in shown
    assert words in shown


def test_accepted_data_stands_in_report_and_checkpoint_and_is_not_asked_for_again(
    stopped: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _add(stopped)
    assert stopped.train("--accept-changed-data") == DONE
    said = [f"update_{STOPPED:06d}: {words}"]
    assert stopped.report()["accepted_data"] == said
    assert words in (stopped.run / "report.md").read_text()
    assert (
        json.loads((stopped.checkpoint(LAST) / "state.json").read_text())["history"]["accepted_data"] == said
    )
    assert [0, "a_new_one.mp4"] in [entry[:2] for entry in stopped.listed(LAST)]
    assert stopped.train() == DONE
    assert stopped.report()["accepted_data"] == said
    capsys.readouterr()
    assert main(["inspect", str(stopped.checkpoint(LAST))]) == DONE
    assert "data: 9 clips trained on, 2 held out, compared by content, sha256 " in capsys.readouterr().out


def test_another_holdout_is_told_as_clips_that_changed_sides(
    stopped: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped.train(settings=("data.holdout_fraction=0.3",)) == BAD_CONFIGURATION
    error = capsys.readouterr().err
    (moved,) = {
        name
        for part, name, *_ in stopped.listed(STOPPED)
        if part == 0 and f"({name}: now in held out)" in error
    }
    assert f"held out: 1 added ({moved}: was in training)" in error


def test_another_order_of_rows_is_a_change(
    stopped: Copy, whole: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of the clips of a folder, in its order, is the same data."""
    names = sorted(path.name for path in stopped.clips.iterdir())
    table = stopped.clips / "clips.csv"
    table.write_text("\n".join(["video", *names]))
    first, second = (_trained_clip(stopped, place).name for place in (0, 1))
    assert stopped.call("check", data=table) == DONE
    assert "other data" not in capsys.readouterr().err
    swapped = {first: second, second: first}
    table.write_text("\n".join(["video", *(swapped.get(name, name) for name in names)]))
    assert stopped.train(data=table) == BAD_CONFIGURATION
    words = f"training: in another order ({second} comes before {first}); 2 of 8 indices stand for another"
    assert words in capsys.readouterr().err


def test_times_count_only_where_they_are_asked_for(
    stopped: Copy, whole: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    by_time = ("data.fingerprint=time",)
    shutil.rmtree(stopped.run)
    assert stopped.train(settings=(*by_time, "curriculum.phases[0].updates=2")) == DONE
    clip = _trained_clip(stopped, 0)
    os.utime(clip, ns=(1, 1))
    go_on = ("curriculum.phases[0].updates=2",)
    assert stopped.train(settings=(*go_on, *by_time)) == BAD_CONFIGURATION
    assert f"training: 1 altered ({clip.name}: another time of the last change)" in capsys.readouterr().err
    # Contents and times cannot be compared, names, sizes and what was probed can.
    assert stopped.train(settings=go_on) == DONE
    assert whole.listed(STOPPED)[0][3] != "", "the original run has contents"


def test_a_checkpoint_without_a_list_goes_on_and_gets_one(
    stopped: Copy, whole: Copy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped.checkpoint(STOPPED)
    (folder / CLIPS).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][CLIPS]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    state = json.loads((folder / "state.json").read_text())
    assert state["history"].pop("accepted_data") == []
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # caplog's handler stays
    caplog.set_level(logging.INFO, logger="aiprod_ds")
    assert stopped.train() == BAD_CONFIGURATION, "without a list the folder's name must stay"
    assert stopped.train(data=whole.clips) == DONE
    told = [record.message for record in caplog.records if record.message.startswith("data_not_compared")]
    assert told == 2 * [f"data_not_compared checkpoint={folder.name}: it is from before lists of clips"]
    assert stopped.report()["final_state_sha256"] == whole.report()["final_state_sha256"]
    assert stopped.listed(LAST) == whole.listed(LAST)


def test_a_damaged_list_is_a_damaged_checkpoint(stopped: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped.checkpoint(STOPPED) / CLIPS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert stopped.train() != DONE
    assert f"{path}: content differs from the manifest's sha256" in capsys.readouterr().err


@pytest.mark.dist
def test_every_rank_hears_of_a_change(whole: Copy, tmp_path: Path) -> None:
    shutil.copytree(whole.clips, tmp_path / "clips")
    found = run_on_ranks(change_on_ranks, ranks=2, arguments={"folder": str(tmp_path)})
    assert found[0] == found[1]
    error, accepted = found[0]
    assert "training: 1 lost (" in error
    assert "--accept-changed-data" in error
    assert accepted == [error.partition("got a change. ")[2].partition(". Restore")[0]]


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Below runs on the ranks.


def change_on_ranks(folder: str) -> tuple[str, list[str]]:
    """Returns the refusal of a run with a clip less, and what stands in the report once it is accepted."""
    from aiprod_ds.engine import dist

    root = Path(folder)
    with without_plots():
        _train_on_ranks(root, updates=2)
        if dist.is_main():
            lists = (root / "run" / "checkpoints" / "update_000002" / CLIPS).read_bytes()
            entries = [json.loads(line) for line in gzip.decompress(lists).splitlines()[1:]]
            (root / "clips" / next(name for part, name, *_ in entries if part == 0)).unlink()
        dist.barrier()
        try:
            _train_on_ranks(root, updates=2)
        except ConfigError as error:
            message = str(error)
        summary = _train_on_ranks(root, updates=2, accept_changed_data=True)
    name, _, words = summary.accepted_data[0].partition(": ")
    assert name == "update_000002"
    return message, [words, *summary.accepted_data[1:]]


def _train_on_ranks(root: Path, *, updates: int, accept_changed_data: bool = False) -> Any:
    phase = {"resolution": "16x16", "duration": {"frames": 5}, "learning_rate": 1e-3}
    config = VAETrainerConfig.model_validate(
        {
            "output_dir": str(root / "run"),
            "model": {"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            "data": {"train": str(root / "clips"), "num_workers": 0, "holdout_fraction": 0.2},
            "loss": {"perceptual_weight": 0.0},
            "curriculum": {"phases": [{"name": "a", "updates": updates, "global_batch_size": 2, **phase}]},
            "engine": {"deepspeed_config": {"zero_optimization": {"stage": 1}}},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
        }
    )
    torch.manual_seed(0)
    trainer = VideoVAETrainer(config, model=TinyVideoVAE())
    return trainer.train(accept_changed_data=accept_changed_data)
