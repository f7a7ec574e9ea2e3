"""Checkpoints of adapters refer to the weights that they were trained on, and a run goes on with no
others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from aiprod_ds.checkpoint.frozen_bases import base_of
from aiprod_ds.checkpoint.shard_files import ShardReader
from aiprod_ds.checkpoint.store import CheckpointStore
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.trainers.diffusion import DiffusionTrainer

pytestmark = pytest.mark.slow

SOURCE = "LTXVideoTransformer3DModel"
LORA = {"training_mode": "lora", "lora": {"rank": 2}}
FULL: dict[str, Any] = {"training_mode": "full"}
SMALLER = {"training_mode": "lora", "lora": {"rank": 1}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pretrained transformer."""
    _write_model(tmp_path / "model", seed=0)
    return tmp_path / "model"


def _write_model(folder: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    getattr(diffusers, SOURCE)(**LTXVideo.tiny_config()).save_pretrained(folder)


def _clips(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 2, 2, 2), "prompt_embeds": (3, 16)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def _trainer(
    folder: Path, model: Path, *phases: dict[str, Any], updates: int = 2, **checkpoint: Any
) -> DiffusionTrainer:
    shape = {"resolution": "64x64", "duration": {"frames": 9}, "global_batch_size": 4}
    each = [
        {"name": f"phase{index}", "updates": updates, "learning_rate": 3e-3, **shape, **phase}
        for index, phase in enumerate(phases)
    ]
    config = DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": SOURCE, "pretrained": str(model)},
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 32,
                "temporal_stride": 8,
            },
            "data": {"train": "given_in_code", "num_workers": 0},
            "curriculum": {"phases": each},
            "engine": {"kind": "local", "deepspeed_config": {"bf16": {"enabled": True}}},
            "checkpoint": {"every_updates": 1, **checkpoint},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
        }
    )
    clips = _clips(7)
    return DiffusionTrainer(config, source="test.yaml", dataset=clips[:6], validation=clips[6:])


def _drop(folder: Path, first: int) -> None:
    """Takes away the checkpoints from update `first` on."""
    for checkpoint in (folder / "checkpoints").glob("update_*"):
        if int(checkpoint.name.removeprefix("update_")) >= first:
            shutil.rmtree(checkpoint)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_holds_the_adapters_and_says_what_they_belong_to(tmp_path: Path, model: Path) -> None:
    _trainer(tmp_path / "run", model, LORA).train()
    _trainer(tmp_path / "copies", model, LORA, self_contained=True).train()
    referring, holding = (tmp_path / name / "checkpoints" / "update_000002" for name in ("run", "copies"))
    base = base_of(referring)
    assert base is not None
    assert (base.is_stored, base.origin) == (False, str(model))
    assert base_of(holding) is None
    assert not (tmp_path / "run" / "checkpoints" / "bases").exists(), "the run can start from it again"
    with ShardReader(referring / "engine") as short, ShardReader(holding / "engine") as whole:
        assert all(".lora_" in name for name in short.names("master"))
        frozen = whole.names("frozen")
        assert short.names("frozen") == frozen
        size = sum(whole.whole("frozen", name).nbytes for name in frozen)
        assert _bytes(holding) - _bytes(referring) == pytest.approx(size, rel=0.2)  # headers and names too
        with pytest.raises(
            CheckpointError, match=rf"holds no frozen/.*, only what was trained on {model}\. Read it there"
        ):
            short.whole("frozen", frozen[0])


# Inside the first adapters, at their end, inside the last.
@pytest.mark.parametrize(("self_contained", "updates"), [(False, (1, 2, 5)), (True, (5,))])
def test_resuming_repeats_the_uninterrupted_run(
    tmp_path: Path, model: Path, self_contained: bool, updates: tuple[int, ...]
) -> None:
    whole = _trainer(tmp_path / "run", model, LORA, FULL, SMALLER, self_contained=self_contained).train()
    bases = tmp_path / "run" / "checkpoints" / "bases"
    assert bases.exists() is not self_contained
    for update in updates:
        shutil.copytree(tmp_path / "run", tmp_path / str(update))
        _drop(tmp_path / str(update), update + 1)
        again = _trainer(
            tmp_path / str(update), model, LORA, FULL, SMALLER, self_contained=self_contained
        ).train()
        assert again.resumed_from == (f"update_{update:06d}",)
        assert again.final_state_sha256 == whole.final_state_sha256


def test_a_run_may_change_between_references_and_copies(tmp_path: Path, model: Path) -> None:
    whole = _trainer(tmp_path / "run", model, LORA, updates=3).train()
    _drop(tmp_path / "run", 2)
    _trainer(tmp_path / "run", model, LORA, updates=3, self_contained=True).train()
    _drop(tmp_path / "run", 3)
    assert base_of(tmp_path / "run" / "checkpoints" / "update_000002") is None
    again = _trainer(tmp_path / "run", model, LORA, updates=3).train()
    assert again.final_state_sha256 == whole.final_state_sha256
    base = base_of(tmp_path / "run" / "checkpoints" / "update_000003")
    assert base is not None
    assert base.is_stored, "what a copy held may have been trained before"


def test_other_weights_under_the_same_name_are_refused_and_both_are_named(
    tmp_path: Path, model: Path
) -> None:
    _trainer(tmp_path / "run", model, LORA).train()
    _drop(tmp_path / "run", 2)
    _write_model(model, seed=1)
    message = rf"that its adapters were trained on, {model} \(sha256 [0-9a-f]{{16}}\), got {model} \(sha256 [0-9a-f]{{16}}\)"  # noqa: E501
    for act in ("train", "evaluate"):
        with pytest.raises(CheckpointError, match=message):
            getattr(_trainer(tmp_path / "run", model, LORA), act)()


def test_a_copy_needs_no_weights_elsewhere(tmp_path: Path, model: Path) -> None:
    whole = _trainer(tmp_path / "run", model, LORA, self_contained=True).train()
    _drop(tmp_path / "run", 2)
    _write_model(model, seed=1)
    assert (
        _trainer(tmp_path / "run", model, LORA, self_contained=True).train().final_state_sha256
        == whole.final_state_sha256
    )


def test_weights_that_the_run_made_are_stored_once_and_read_through_the_checkpoint(
    tmp_path: Path, model: Path
) -> None:
    _trainer(tmp_path / "run", model, FULL, LORA).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in (checkpoints / "bases").iterdir()] == [
        base_of(checkpoints / "update_000003").sha256
    ]  # type: ignore[union-attr]
    with (
        ShardReader(checkpoints / "update_000002" / "engine") as full,
        ShardReader(checkpoints / "update_000004" / "engine") as last,
    ):
        assert last.facts.base is not None
        assert f"{model}, trained until phase phase1" == last.facts.base.origin
        for name in last.names("frozen"):
            before = full.whole("master", name.replace(".base_layer", ""))
            assert torch.equal(last.whole("frozen", name), before.bfloat16())


@pytest.mark.parametrize("damage", ["missing", "flipped", "facts"])
def test_a_checkpoint_whose_base_is_damaged_is_skipped(tmp_path: Path, model: Path, damage: str) -> None:
    _trainer(tmp_path / "run", model, FULL, LORA).train()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (stored,) = (store.folder / "bases").iterdir()
    if damage == "missing":
        shutil.rmtree(stored)
    else:
        path = stored / "engine" / ("engine.json" if damage == "facts" else "rank_00000_of_00001.safetensors")
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"bases/{stored.name}"):
        store.read(store.folder / "update_000004")
    newest = store.newest()
    assert newest is not None
    assert newest.folder.name == "update_000002", "the last that needs no base"
    again = _trainer(tmp_path / "run", model, FULL, LORA).train()
    assert again.resumed_from == ("update_000002",)
    assert store.newest() is not None
    assert (store.read(store.folder / "update_000004").folder / "engine").is_dir(), (
        "the base was stored again"
    )


def test_a_base_goes_with_the_last_checkpoint_that_refers_to_it(tmp_path: Path, model: Path) -> None:
    _trainer(tmp_path / "run", model, FULL, LORA, SMALLER, keep_last=3).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("update_*"))
    assert names == ["update_000004", "update_000005", "update_000006"]
    kept = {base.sha256 for name in names if (base := base_of(checkpoints / name)) is not None}
    assert {path.name for path in (checkpoints / "bases").iterdir()} == kept
    assert len(kept) == 2, "that of the rank 2 adapters is still needed"
    shutil.rmtree(tmp_path / "run")
    _trainer(tmp_path / "run", model, FULL, LORA, SMALLER, keep_last=2).train()
    assert len(list((checkpoints / "bases").iterdir())) == 1


def test_self_contained_without_adapters_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint\.self_contained: has no effect unless a phase trains adapters"
    ):
        _trainer(tmp_path / "run", model, FULL, self_contained=True)
