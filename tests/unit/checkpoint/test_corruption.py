"""A damaged or hostile checkpoint never loads: one that a tiny run wrote, damaged in a hundred and some ways.

Every time the verification must name the file, change nothing and unpickle nothing; the checkpoint before it
is taken instead.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.synthetic import SyntheticVideoDataset
from aiprod_ds.engine import dist
from aiprod_ds.errors import CheckpointError
from aiprod_ds.testing.tiny import TinyVideoVAE
from aiprod_ds.trainers.video_vae import VideoVAETrainer

RANDOM_DAMAGES = 100
NEWEST = "update_000002"
WEIGHTS, MOMENTS = "engine/rank_00000_of_00001.safetensors", "engine/rank_00000_of_00001.moments.safetensors"


def _trainer(folder: Path) -> VideoVAETrainer:
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 3},
        "updates": 2,
        "learning_rate": 0.01,
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"source": "given_in_code"},
        "data": {"train": "given_in_code", "num_workers": 0},
        "loss": {"perceptual_weight": 0.0},
        "curriculum": {"phases": [{**phase, "global_batch_size": 2}]},
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 0}}},
        "ema": {"half_life_samples": 4},
        "checkpoint": {"every_updates": 1},
        "evaluation": {"max_clips": 2, "num_pictures": 0},
    }
    torch.manual_seed(0)
    clips = [SyntheticVideoDataset(num_clips=4, frames=4, height=16, width=16, seed=seed) for seed in (0, 1)]
    return VideoVAETrainer(
        VAETrainerConfig.model_validate(values), model=TinyVideoVAE(), dataset=clips[0], validation=clips[1]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with dist.process_group():
        _trainer(folder).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _require_refused(run: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(run / "checkpoints")
    before = _contents(run)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
        with pytest.raises(CheckpointError) as caught:
            store.read(store.folder / NEWEST)
        assert named in str(caught.value)
        newest = store.newest()
    assert newest is not None
    assert newest.folder.name == "update_000001"
    assert _contents(run) == before


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, int(path.stat().st_size * chance.choice((0.0, 0.5, 0.99))))


def _swap(path: Path, chance: random.Random) -> None:
    other = chance.choice(
        [file for file in path.parents[0].rglob("*") if file.is_file() and file != path] or [path]
    )
    content = path.read_bytes()
    path.write_bytes(other.read_bytes() if other != path else content[::-1])
    other.write_bytes(content if other != path else other.read_bytes())


def _add(path: Path, chance: random.Random) -> None:
    path.with_name(f"extra_{chance.randrange(100)}.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


DAMAGES: list[Callable[[Path, random.Random], object]] = [
    _flip,
    _flip,
    _truncate,
    lambda path, _: path.unlink(),
    _swap,
    _add,
]


@pytest.mark.parametrize("number", range(RANDOM_DAMAGES))
def test_a_random_damage_is_caught(run: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(number)
    folder = run / "checkpoints" / NEWEST
    path = chance.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    DAMAGES[number % len(DAMAGES)](path, chance)
    _require_refused(run, f"{NEWEST}/", monkeypatch)


def _manifest(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


def _list(folder: Path, name: str, content: bytes) -> None:
    """Makes the manifest say that `name` has `content`, as someone would who means harm."""
    values = _manifest(folder)
    values["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(values))


def _file_with_header(folder: Path, header_bytes: int, name: str = WEIGHTS) -> None:
    content = header_bytes.to_bytes(8, "little") + b"{}" * 8
    (folder / name).write_bytes(content)
    _list(folder, name, content)


def _link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def _without_state(folder: Path) -> None:
    values = _manifest(folder)
    del values["files"]["state.json"]
    (folder / "state.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(values))


def _of_another_update(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("update_000001"), folder)


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "path above": (lambda folder: _list(folder, "../latest", b"update_000002\n"), "'../latest'"),
    "path above, inside": (lambda folder: _list(folder, "engine/../../latest", b""), "'engine/../../latest'"),
    "absolute path": (lambda folder: _list(folder, "/etc/hostname", b""), "'/etc/hostname'"),
    "zero byte": (lambda folder: _list(folder, "a\0b", b""), "manifest.json"),
    "hidden": (lambda folder: _list(folder, ".profile", b""), "'.profile'"),
    "link to a file": (lambda folder: _link(folder, WEIGHTS, "/etc/hostname"), WEIGHTS),
    "link to the good one": (
        lambda folder: _link(folder, WEIGHTS, f"../../update_000001/{WEIGHTS}"),
        WEIGHTS,
    ),
    "link as manifest": (
        lambda folder: _link(folder, "manifest.json", "../update_000001/manifest.json"),
        "manifest.json",
    ),
    "pipe": (_pipe, WEIGHTS),
    "1 GB header": (lambda folder: _file_with_header(folder, 1 << 30), WEIGHTS),
    "1 GB header of moments": (lambda folder: _file_with_header(folder, 1 << 30, MOMENTS), MOMENTS),
    "link to the good moments": (
        lambda folder: _link(folder, MOMENTS, f"../../update_000001/{MOMENTS}"),
        MOMENTS,
    ),
    "header beyond the end": (lambda folder: _file_with_header(folder, 17), WEIGHTS),
    "no sizes": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {"a": {}}}'),
        "a must have bytes",
    ),
    "files a list": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": []}'),
        "manifest.json",
    ),
    "deep": (lambda folder: (folder / "manifest.json").write_text("[" * 200_000), "manifest.json"),
    "huge manifest": (lambda folder: os.truncate(folder / "manifest.json", 1 << 30), "manifest.json"),
    "state not listed": (_without_state, "manifest.json"),
    "another update": (_of_another_update, NEWEST),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, named = HOSTILE[name]
    folder = run / "checkpoints" / NEWEST
    damage(folder)
    if name == "huge manifest":  # hashing 1 GB of nothing for the comparison takes seconds
        with pytest.raises(CheckpointError, match=r"manifest\.json: must have at most 67108864 bytes"):
            CheckpointStore(folder.parent).read(folder)
        return
    _require_refused(run, named, monkeypatch)


def test_a_link_in_place_of_a_checkpoint_is_skipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints" / NEWEST
    folder.rename(run / "elsewhere")
    folder.symlink_to(run / "elsewhere")
    _require_refused(run, "got a link", monkeypatch)


def test_the_undamaged_copy_is_read(run: Path) -> None:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    assert newest.folder.name == NEWEST


@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS])
def test_without_a_good_one_only_resume_never_starts_over(run: Path, file: str) -> None:
    for folder in (run / "checkpoints").glob("update_*"):
        _flip(folder / file, random.Random(0))
    before = _contents(run)
    with dist.process_group():
        with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
            _trainer(run).train()
        assert _contents(run) == before
        assert _trainer(run).train(resume="never").resumed_from == ()
    assert _contents(run.with_name("run.1")) == before
