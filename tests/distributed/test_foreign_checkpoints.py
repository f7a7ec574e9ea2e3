"""Checkpoints of DeepSpeed and of torch.distributed.checkpoint, saved by two ranks, read without either; one
call makes all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.convert import deepspeed_folder
from aiprod_ds.convert.deepspeed_folder import DeepSpeedFolder, find_tag_folder
from aiprod_ds.convert.distributed_folder import DistributedFolder, find_distributed_folder
from aiprod_ds.errors import CheckpointError
from aiprod_ds.testing.dist import run_on_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]
CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
FROZEN, BUFFERS = {"frozen.weight", "frozen.bias"}, {"counts", "mean"}


class Net(nn.Module):
    """Sizes that two ranks cannot share evenly, a frozen layer, and buffers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.norm, self.last = (
            nn.Linear(5, 7),
            nn.Linear(7, 3),
            nn.LayerNorm(7),
            nn.Linear(7, 3),
        )
        self.frozen.requires_grad_(False)
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("mean", torch.tensor([0.1, 0.2]))

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.norm(self.first(values))
        answer: Tensor = self.last(hidden) + self.frozen(hidden)
        return answer


def save_all(folder: str) -> None:
    """On each rank: saves one checkpoint for every case, and beside each what its weights are."""
    for stage, precision in CASES:
        _save_deepspeed(Path(folder) / f"zero{stage}_{precision}", stage, precision)
    _save_sharded(Path(folder))


def _save_deepspeed(folder: Path, stage: int, precision: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from aiprod_ds.engine.deepspeed_internals import leave_out_shared_memory_op

    torch.manual_seed(0)
    net = Net()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    settings["zero_optimization"] = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }
    settings[precision] = {"enabled": True}
    if precision == "fp32":
        del settings["fp32"]
    leave_out_shared_memory_op()  # else DeepSpeed compiles it, and leaves its memory behind
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings
    )
    for _ in range(2):
        engine.backward(
            engine(torch.ones(2, 5, dtype=next(engine.module.parameters()).dtype)).float().square().mean()
        )
        engine.step()
    engine.save_checkpoint(str(folder), tag="tag")
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            value = parameter.detach().float().clone()
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad and stage else None
        weights[name] = value if full is None else full.clone()
    _save_expected(folder, weights)
    engine.destroy()


def _save_sharded(folder: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = Net()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    checkpoint.save(
        {"model": net.state_dict(), "updates": 7},
        checkpoint_id=str(folder / "sharded" / "pytorch_model_fsdp_0"),
    )
    _save_expected(folder / "sharded", weights)


def _save_expected(folder: Path, weights: dict[str, Tensor]) -> None:
    if torch.distributed.get_rank() == 0:
        torch.save({name: value.detach() for name, value in weights.items()}, folder / "expected.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(save_all, ranks=2, arguments={"folder": str(folder)}, timeout_seconds=600)
    return folder


def _expected(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(folder / "expected.pt", weights_only=True)
    return weights


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_deepspeeds_weights_are_read_to_the_bit(saved: Path, stage: int, precision: str) -> None:
    folder = saved / f"zero{stage}_{precision}"
    source = DeepSpeedFolder(find_tag_folder(folder) or folder, is_trusted=True)
    expected = _expected(folder)
    assert set(source) == {*expected, *BUFFERS}
    assert all(torch.equal(source[name].float(), value) for name, value in expected.items())
    assert torch.equal(source["counts"], torch.arange(3))
    trained = set(expected) - FROZEN
    assert {source.specs[name].dtype for name in trained} == {torch.float32}
    assert {source.specs[name].dtype for name in FROZEN} == {
        torch.bfloat16 if precision == "bf16" else torch.float32
    }
    assert (source.updates, set(source.trained)) == (2, trained if stage else set())


def test_files_that_are_mapped_anew_give_the_same(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after every 256 MB of a large checkpoint."""
    source = DeepSpeedFolder(saved / "zero3_bf16" / "tag", is_trusted=True)
    whole = dict(source)
    monkeypatch.setattr(deepspeed_folder, "_MAPPED_BYTES", 1)
    assert all(torch.equal(source[name], value) for name, value in whole.items())


def test_fsdps_weights_are_read_to_the_bit(saved: Path) -> None:
    source = DistributedFolder(find_distributed_folder(saved / "sharded") or saved, is_trusted=True)
    expected = _expected(saved / "sharded")
    assert source.top_level == ("model",)
    assert set(source) == {f"model.{name}" for name in (*expected, *BUFFERS)}
    assert all(torch.equal(source[f"model.{name}"], value) for name, value in expected.items())


def _changed(saved: Path, tmp_path: Path, name: str, change: Callable[[Path], object]) -> Path:
    folder = tmp_path / name
    shutil.copytree(saved / name, folder)
    change(folder)
    return folder


DEFECTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a rank's states are missing": (
        "zero1_fp32",
        lambda folder: (folder / "tag" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
        "must hold the states of .* ranks, got 1 files",
    ),
    "the first rank's states are missing": (
        "zero1_fp32",
        lambda folder: (folder / "tag" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink(),
        "must hold the files of all ranks, got none of rank 0",
    ),
    "a model file of ZeRO-3 is missing": (
        "zero3_fp32",
        lambda folder: (folder / "tag" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink(),
        "got 1 and 2",
    ),
    "tensor parallelism": (
        "zero1_fp32",
        lambda folder: (folder / "tag" / "mp_rank_01_model_states.pt").write_bytes(b""),
        "got mp_rank_01_model_states.pt of model, pipeline or expert parallelism",
    ),
    "a truncated file": (
        "zero1_fp32",
        lambda folder: (folder / "tag" / "mp_rank_00_model_states.pt").write_bytes(b"PK"),
        r"mp_rank_00_model_states\.pt: must hold tensors",
    ),
    "latest leads out": (
        "zero1_fp32",
        lambda folder: (folder / "latest").write_text("../zero1_fp32/tag"),
        "must be the name of a",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_damaged_checkpoint_of_deepspeed_is_refused(saved: Path, tmp_path: Path, defect: str) -> None:
    name, change, message = DEFECTS[defect]
    folder = _changed(saved, tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message):
        DeepSpeedFolder(find_tag_folder(folder) or folder, is_trusted=True)


def test_a_damaged_checkpoint_of_fsdp_is_refused(saved: Path, tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        path = folder / "pytorch_model_fsdp_0" / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:100])

    source = DistributedFolder(
        _changed(saved, tmp_path, "sharded", cut) / "pytorch_model_fsdp_0", is_trusted=True
    )
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: must hold tensors"):
        dict(source)
