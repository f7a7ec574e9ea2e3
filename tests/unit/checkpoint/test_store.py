"""Checkpoints are whole or absent: the commit, the search for the newest good one, and every way a folder can
be damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aiprod_ds.checkpoint.manifest import FileRecord, HashCheck
from aiprod_ds.checkpoint.state import RunState, tensors_sha256
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.clock import Clock
from aiprod_ds.errors import CheckpointError

CLOCK = Clock(
    updates=7,
    skipped_updates=1,
    micro_batches=16,
    samples=56,
    phase=1,
    phase_updates=3,
    phase_skipped=1,
    epoch=2,
)
ENGINE_BYTES = bytes(range(256))
WEIGHTS, MOMENTS = "engine/rank_00000_of_00001.safetensors", "engine/rank_00000_of_00001.moments.safetensors"
Damage = Callable[[Path], object]


def _state(updates: int = 7) -> RunState:
    return RunState(
        clock=replace(
            CLOCK,
            updates=updates,
            micro_batches=2 * updates + 2,
            samples=8 * updates,
            phase_updates=updates // 2,
        ),
        scheduler={"plateau": {"best": 0.25, "stale": 3}},
        fingerprint="abc",
        phase_fingerprints=("p0", "p1"),
        layout={"world_size": 2, "zero_stage": 1},
        history={"before": {"psnr_db": 12.5}},
    )


def _commit(store: CheckpointStore, updates: int) -> Path:
    pending = store.open_pending(updates)
    (pending / "engine" / "weights.bin").write_bytes(ENGINE_BYTES)
    return store.commit(updates, _state(updates))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def test_a_store_that_was_never_written_has_nothing(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.names() == []
    assert not store.folder.exists()


def test_commit_describes_every_file_and_leaves_nothing_pending(store: CheckpointStore) -> None:
    folder = _commit(store, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name == "update_000007"
    assert manifest["format"] == 2
    assert set(manifest["files"]) == {"engine/weights.bin", "state.json"}
    assert manifest["files"]["engine/weights.bin"] == {
        "bytes": 256,
        "sha256": sha256(ENGINE_BYTES).hexdigest(),
    }
    assert (store.folder / "latest").read_text() == "update_000007\n"
    assert sorted(entry.name for entry in store.folder.iterdir()) == ["latest", "update_000007"]


def test_clock_and_state_come_back_as_saved(store: CheckpointStore) -> None:
    _commit(store, 7)
    found = store.newest()
    assert found is not None
    assert found.state == _state(7)
    assert found.state.clock == CLOCK
    assert (found.engine_folder / "weights.bin").read_bytes() == ENGINE_BYTES


def test_newest_compares_numbers_not_text(store: CheckpointStore) -> None:
    for updates in (999_999, 1_000_000, 5):
        _commit(store, updates)
    assert store.names() == ["update_1000000", "update_999999", "update_000005"]
    found = store.newest()
    assert found is not None
    assert found.state.clock.updates == 1_000_000


def test_an_uncommitted_checkpoint_is_not_seen_and_the_next_save_clears_it(store: CheckpointStore) -> None:
    _commit(store, 2)
    abandoned = store.open_pending(4)
    assert store.names() == ["update_000002"]
    _commit(store, 6)
    assert not abandoned.exists()


def test_saving_again_under_the_same_name_replaces_it(store: CheckpointStore) -> None:
    _commit(store, 2)
    pending = store.open_pending(2)
    (pending / "engine" / "weights.bin").write_bytes(b"new")
    folder = store.commit(2, _state(2))
    assert (store.read(folder).engine_folder / "weights.bin").read_bytes() == b"new"
    assert sorted(entry.name for entry in store.folder.iterdir()) == ["latest", "update_000002"]


def _flip_a_bit(folder: Path) -> None:
    file = folder / "engine" / "weights.bin"
    file.write_bytes(bytes([ENGINE_BYTES[0] ^ 1]) + ENGINE_BYTES[1:])


def _truncate(folder: Path) -> None:
    (folder / "engine" / "weights.bin").write_bytes(ENGINE_BYTES[:-1])


def _edit_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text().replace("abc", "abd"))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "bit flipped": (_flip_a_bit, "content differs from the manifest's sha256"),
    "truncated": (_truncate, "must have 256 bytes, got 255"),
    "file missing": (
        lambda folder: (folder / "engine" / "weights.bin").unlink(),
        "listed in the manifest but missing",
    ),
    "state edited": (_edit_state, "content differs from the manifest's sha256"),
    "manifest missing": (
        lambda folder: (folder / "manifest.json").unlink(),
        "missing; this is not a whole checkpoint",
    ),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable"),
    "manifest a list": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "must hold a mapping, got list",
    ),
    "other format": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 9}'),
        "must be of format 2, got 9",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_newest_falls_back_past_a_damaged_checkpoint_and_says_why(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    damage, reason = DAMAGES[name]
    _commit(store, 2)
    damage(_commit(store, 4))
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None
    assert found.state.clock.updates == 2
    assert "checkpoint_skipped name=update_000004" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("name", DAMAGES)
def test_without_a_good_checkpoint_nothing_starts_over(store: CheckpointStore, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(_commit(store, 2))
    damage(_commit(store, 4))
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole") as caught:
        store.newest()
    assert str(caught.value).count(reason) == 2
    assert "--resume never" in str(caught.value)


def _flip_a_moment(folder: Path) -> None:
    content = bytearray((folder / MOMENTS).read_bytes())
    content[-1] ^= 1
    (folder / MOMENTS).write_bytes(content)


@pytest.fixture
def with_moments(store: CheckpointStore) -> Path:
    """A checkpoint with one weight and one moment."""
    pending = store.open_pending(2)
    for name, kind in ((WEIGHTS, "master"), (MOMENTS, "exp_avg")):
        save_file({f"{kind}/w": torch.ones(1)}, pending / name)
    return store.commit(2, _state(2))


def test_who_reads_weights_only_does_not_hash_moments(store: CheckpointStore, with_moments: Path) -> None:
    _flip_a_moment(with_moments)
    assert store.read(with_moments, weights_only=True).state == _state(2)
    assert store.newest(weights_only=True) is not None
    with pytest.raises(CheckpointError, match=rf"{MOMENTS}: content differs from the manifest's sha256"):
        store.read(with_moments)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MOMENTS).unlink(), rf"{MOMENTS}: listed in the manifest but missing"),
        (lambda folder: (folder / MOMENTS).write_bytes(b"x"), rf"{MOMENTS}: must have \d+ bytes, got 1"),
        (
            lambda folder: (folder / MOMENTS).write_bytes(b"\xff" * (folder / MOMENTS).stat().st_size),
            rf"{MOMENTS}: must be a safetensors file, got a header of \d+ bytes in a file of \d+",
        ),
        (
            lambda folder: (folder / "engine" / "x.moments.safetensors").touch(),
            "must be listed in the manifest",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"x"),
            rf"{WEIGHTS}: content differs from the manifest's sha256",
        ),
    ],
    ids=["missing", "another size", "no header", "surplus", "weights"],
)
def test_everything_but_the_hashes_of_moments_is_compared_for_weights_too(
    store: CheckpointStore, with_moments: Path, damage: Damage, reason: str
) -> None:
    damage(with_moments)
    with pytest.raises(CheckpointError, match=reason):
        store.read(with_moments, weights_only=True)


def test_hashes_of_tensors_may_be_compared_while_they_are_read(
    store: CheckpointStore, with_moments: Path
) -> None:
    with HashCheck() as hashes:
        assert store.read(with_moments, hashes=hashes).state == _state(2)
        hashes.confirm()
    _flip_a_moment(with_moments)
    with HashCheck() as hashes:
        assert store.read(with_moments, hashes=hashes).state == _state(2)
        with pytest.raises(CheckpointError, match=rf"{MOMENTS}: content differs from the manifest's sha256"):
            hashes.confirm()
    _edit_state(with_moments)
    with HashCheck() as hashes, pytest.raises(CheckpointError, match=r"state\.json: content differs"):
        store.read(with_moments, hashes=hashes)


def test_a_file_that_cannot_be_read_is_not_confirmed(tmp_path: Path) -> None:
    with HashCheck(spared_cores=1000) as hashes:
        hashes.start(tmp_path / "gone", FileRecord(bytes=1, sha256="0" * 64))
        with pytest.raises(CheckpointError, match=r"gone: must be readable, got .*No such file"):
            hashes.confirm()


@pytest.mark.parametrize("name", ["../outside.bin", "engine/../../outside.bin", "/etc/hostname"])
def test_a_manifest_that_points_outside_is_refused(store: CheckpointStore, name: str) -> None:
    folder = _commit(store, 2)
    (store.folder / "outside.bin").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="files must stay inside the checkpoint"):
        store.read(folder)


def test_state_with_an_unknown_or_missing_field_is_refused() -> None:
    values = _state().to_dict()
    with pytest.raises(CheckpointError, match="fields must be"):
        RunState.from_dict({**values, "extra": 1})
    with pytest.raises(CheckpointError, match="fields must be"):
        RunState.from_dict({key: value for key, value in values.items() if key != "layout"})


@pytest.mark.parametrize("value", [-1, 1.0, True, "3"])
def test_a_clock_takes_only_counts(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"clock\.updates: must be an integer from 0 to"):
        Clock.from_dict({**CLOCK.to_dict(), "updates": value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_the_hash_of_tensors_sees_every_bit_name_and_shape(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    first = tensors_sha256([("a", tensor)])
    changed = tensor.clone()
    changed[5] = 7
    others = [[("b", tensor)], [("a", tensor.view(2, 3))], [("a", changed)], [("a", tensor.double())]]
    assert tensors_sha256([("a", tensor.clone())]) == first
    assert len({first, *(tensors_sha256(other) for other in others)}) == 5


def test_one_that_is_not_accepted_counts_as_not_there(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for updates in (4, 7, 9):
        _commit(store, updates)
    found = store.newest(accepts=lambda state: state.clock.updates < 8)
    assert found is not None
    assert found.state.clock.updates == 7
    assert "checkpoint_passed_over name=update_000009" in caplog.text
    assert store.newest(accepts=lambda _state: False) is None
    assert [name for name, _ in store.states()] == ["update_000009", "update_000007", "update_000004"]
    (store.folder / "update_000007" / "state.json").write_text("{")
    assert [name for name, _ in store.states()] == ["update_000009", "update_000004"]
