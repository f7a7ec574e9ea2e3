"""Runs on a real file system of 8 MB that is full, read-only or gone for a while, and gets well again.

It is mounted in a process of the test's own. Oracle: the same run on a disk that stays well: weights and
optimizer bit for bit, every row, every record.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import Dataset

from aiprod_ds.testing.disks.small import SmallDisk, in_own_mounts, why_not

UPDATES, EVERY = 8, 2
FAILS_AT, WELL_AT = 2, 3  # evaluations, of 0, 1, ... at updates 0, 2, ...
WAYS = ("full", "read-only", "gone")


class Watched(Dataset[Tensor]):
    """One held-out clip, whose reads by evaluations are counted."""

    def __init__(self, clips: Any, act: Callable[[int], None]) -> None:
        self._clips, self._act = clips, act
        self._reads = -1  # one before anything else, to learn its length

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        if self._reads >= 0:
            self._act(self._reads)
        self._reads += 1
        clip: Tensor = self._clips[index]
        return clip


def train(folder: Path, *, rule: str, act: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Returns how a run ended, and what it left."""
    import torch

    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.data.synthetic import SyntheticVideoDataset
    from aiprod_ds.errors import AiprodError
    from aiprod_ds.metrics.evaluations import read_evaluations
    from aiprod_ds.testing.runs import repeatable_rows
    from aiprod_ds.testing.tiny import TinyVideoVAE
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

    clips = [SyntheticVideoDataset(num_clips=2, frames=5, height=16, width=16, seed=seed) for seed in (0, 1)]
    phase = {
        "name": "only",
        "updates": UPDATES,
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
        "checkpoint": {"every_updates": EVERY, "on_full_disk": rule},
        "evaluation": {"max_clips": 1, "num_pictures": 1, "every_updates": EVERY},
        "report": {"flush_updates": 1, "tensorboard": True, "on_full_disk": rule},
    }
    torch.manual_seed(0)
    config = VAETrainerConfig.model_validate(values)
    trainer = VideoVAETrainer(
        config, model=TinyVideoVAE(), dataset=clips[0], validation=Watched(clips[1], act)
    )
    try:
        summary = trainer.train()
    except AiprodError as error:
        return {"error": type(error).__name__, "message": str(error)}
    records = [replace(record, seconds=0.0, media=()).to_dict() for record in read_evaluations(folder)]
    return {
        "sha256": summary.final_state_sha256,
        "not_written": list(summary.not_written),
        "not_saved": [save["update"] for save in summary.not_saved],
        "rows": repeatable_rows(folder),
        "records": records,
        "report": json.loads((folder / "report.json").read_text())["status"],
        "page": (folder / "report.html").is_file(),
        "events": _scalars(folder / "tensorboard"),
        "exported": sorted(path.name for path in (folder / "export").iterdir()),
    }


def _scalars(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars("loss/total")]


def main(root: Path) -> None:
    """Prints what all runs left, as JSON; in mounts of its own."""
    from aiprod_ds.checkpoint.store import CheckpointStore
    from aiprod_ds.engine import dist

    dist.initialize()
    found: dict[str, Any] = {"well": train(root / "well", rule="go_on")}
    for way in WAYS:
        for rule in ("go_on", "stop"):
            folder, below = root / f"{way} {rule}", root / f"below {way} {rule}"
            folder.mkdir()
            below.mkdir()
            disk = SmallDisk(folder, below)
            disk.mount()
            fail = {"full": disk.fill, "read-only": disk.make_read_only, "gone": disk.take_away}[way]
            mend = disk.make_room if way == "full" else disk.uncover

            def act(number: int, rule: str = rule, fail: Any = fail, mend: Any = mend) -> None:
                if number == FAILS_AT:
                    fail()
                elif number == WELL_AT and rule == "go_on":
                    mend()

            ended = train(folder / "run", rule=rule, act=act)
            if rule == "stop":
                mend()
                newest = CheckpointStore(folder / "run" / "checkpoints").newest()
                stands = None if newest is None else newest.state.clock.updates
                found[f"{way} stopped"] = {**ended, "stands": stands}
                ended = train(folder / "run", rule=rule)
            names = [path.name for path in (folder / "run").rglob("*")]
            ended["leftovers"] = [
                name for name in names if name.endswith((".tmp", ".pending", ".unfinished"))
            ]
            found[f"{way} {rule}"] = ended
    dist.shutdown()
    print("found:", json.dumps(found))  # noqa: T201  read by the test


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("disks")
    if (reason := why_not(root)) is not None:
        pytest.skip(f"this machine lets nobody mount a file system: {reason}")
    command = in_own_mounts([sys.executable, "-W", "error::ResourceWarning", __file__, str(root)])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Traceback" not in ended.stdout + ended.stderr
    line = next(line for line in ended.stdout.splitlines() if line.startswith("found:"))
    found: dict[str, Any] = {"stderr": ended.stderr, **json.loads(line.removeprefix("found:"))}
    return found


@pytest.mark.parametrize("rule", ["go_on", "stop"])
@pytest.mark.parametrize("way", WAYS)
def test_in_the_end_all_is_as_on_a_disk_that_stays_well(runs: dict[str, Any], way: str, rule: str) -> None:
    well, found = runs["well"], runs[f"{way} {rule}"]
    assert found["sha256"] == well["sha256"]
    for key in ("rows", "records", "report", "page", "exported", "events"):
        assert found[key] == well[key], key
    assert well["events"] == list(range(1, UPDATES + 1))
    assert found["leftovers"] == []


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_says_what_was_not_written(runs: dict[str, Any], way: str) -> None:
    found = runs[f"{way} go_on"]
    assert found["not_saved"] == [FAILS_AT * EVERY]
    # What is open already can be written where a disk has become read-only, and a line that its last page has
    # room for where it is full.
    expected = {"samples", "metrics.jsonl", "evaluations.jsonl"} if way == "gone" else {"samples"}
    assert expected <= {note.partition(":")[0] for note in found["not_written"]}
    assert all("later ones did not" in note for note in found["not_written"])


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_stops_leaves_the_checkpoint_before(runs: dict[str, Any], way: str) -> None:
    stopped = runs[f"{way} stopped"]
    assert stopped["stands"] == (FAILS_AT - 1) * EVERY
    assert stopped["error"] in {"DiskFullError", "DiskFaultError", "DiskError"}
    assert "bytes free" in stopped["message"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
