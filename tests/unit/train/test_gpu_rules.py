"""What a V100 is refused, and how torch is set on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.models.registry import build_model
from aiprod_ds.planner.hardware import MACHINES
from aiprod_ds.train.planning.gpu_rules import prepare_gpu, require_runnable

FILES = Path(__file__).parents[3] / "ds_configs"
V100, A100 = MACHINES["v100-32gb"], MACHINES["a100-80gb"]


def _model(head: int) -> torch.nn.Module:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": head,
        "cross_attention_dim": 2 * head,
        "num_layers": 1,
    }
    return build_model(ModelConfig(source="LTXVideoTransformer3DModel", config=config), seed=0, device="meta")


def _require(file: str, *, head: int = 16, machine: str = "v100-32gb") -> None:
    settings = parse_deepspeed_settings(FILES / f"{file}.json", where=file)
    require_runnable(_model(head), settings, MACHINES[machine], where="run.yaml")


@pytest.mark.parametrize(
    "file", ["zero1_fp16_v100", "zero2_fp16_v100_offload", "zero3_fp16_v100", "zero1_fp32"]
)
def test_fp16_and_fp32_run_on_a_v100(file: str) -> None:
    _require(file)


@pytest.mark.parametrize("file", ["zero0_bf16", "zero1_bf16", "zero3_bf16_offload"])
def test_bf16_is_refused_on_a_v100_and_nowhere_else(file: str) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.yaml: bf16\.enabled: needs compute capability 8\.0 or higher, got v100-32gb"
    ):
        _require(file)
    for machine in MACHINES.keys() - {"v100-32gb"}:
        _require(file, machine=machine)


def test_heads_that_the_memory_efficient_kernel_does_not_take_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.attention_head_dim: must be a multiple of 8 in fp16 on v100-32gb, got 12"
    ):
        _require("zero1_fp16_v100", head=12)
    _require("zero1_fp32", head=12)
    _require("zero1_bf16", head=12, machine="a100-80gb")


@pytest.mark.parametrize("backend", ["flash", "_flash_3", "_native_flash", "sage"])
def test_attention_of_newer_gpus_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", backend)
    with pytest.raises(
        ConfigError, match=f"DIFFUSERS_ATTN_BACKEND: must be one of native, .* got '{backend}'"
    ):
        _require("zero1_fp16_v100")


@pytest.fixture
def kept_backends() -> Iterator[None]:
    cuda = torch.backends.cuda
    kept = (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    reduced = cuda.matmul.allow_fp16_reduced_precision_reduction
    yield
    cuda.enable_flash_sdp(kept[0])
    cuda.enable_cudnn_sdp(kept[1])
    cuda.enable_mem_efficient_sdp(kept[2])
    cuda.matmul.allow_fp16_reduced_precision_reduction = reduced


@pytest.mark.usefixtures("kept_backends")
def test_a_v100_gets_memory_efficient_attention_and_fp32_sums() -> None:
    cuda = torch.backends.cuda
    before = cuda.flash_sdp_enabled()
    prepare_gpu(A100)
    assert cuda.flash_sdp_enabled() == before
    prepare_gpu(V100)
    assert (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled()) == (
        False,
        False,
        True,
    )
    assert cuda.matmul.allow_fp16_reduced_precision_reduction is False
