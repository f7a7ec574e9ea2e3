"""What the diffusion trainer exports: diffusers and PEFT load it and predict what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families import registry
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.models.lora import add_lora
from aiprod_ds.testing.families import pipeline_around, tiny_batch, tiny_transformer, velocities
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.trainers.diffusion_export import export_transformer

pytestmark = pytest.mark.slow

STRIDES = ModelStrides(spatial=32, temporal=8)
LORA = LoraConfig(rank=4, alpha=6.0)
WEIGHTS = "diffusion_pytorch_model"
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)


def _trained(
    family_type: type[Family], *, lora: LoraConfig | None = None, precision: str = "fp32"
) -> tuple[LocalEngine, DiffusionModule]:
    """Returns a tiny model after two updates; the second is the first that moves every adapter."""
    transformer = tiny_transformer(family_type)
    family = find_family(transformer, STRIDES)
    if lora is not None:
        add_lora(transformer, lora, allowed=family.lora_targets, seed=0)
    module = DiffusionModule(transformer, family)
    settings: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings(settings, where="test"),
        micro_batch_size=2,
        accumulation=1,
    )
    engine.set_learning_rate(0.03)
    for seed in (1, 2):
        engine.backward(velocities(engine, family, tiny_batch(seed=seed)).float().square().mean())
        assert engine.step() is not None
    engine.eval()
    return engine, module


def _output(transformer: nn.Module) -> Tensor:
    family = find_family(transformer, STRIDES)
    with torch.no_grad():
        return velocities(DiffusionModule(transformer.eval(), family), family, tiny_batch())


def _load(family_type: type[Family], folder: Path) -> Any:
    return getattr(diffusers, family_type.transformer_class).from_pretrained(folder)


def _assert_trained(transformer: nn.Module, family_type: type[Family]) -> None:
    """The start is far away against every tolerance here, so that equal outputs show something."""
    assert float((_output(transformer) - _output(tiny_transformer(family_type))).abs().max()) > 1e-2


@each_family
def test_diffusers_loads_a_whole_model(family_type: type[Family], tmp_path: Path) -> None:
    engine, module = _trained(family_type)
    _assert_trained(module.transformer, family_type)
    export_transformer(engine, module, tmp_path / "export", lora=None)
    assert {path.name for path in (tmp_path / "export").iterdir()} == {
        "config.json",
        f"{WEIGHTS}.safetensors",
    }
    # The same weights in the same arithmetic: equal to the bit.
    assert torch.equal(_output(_load(family_type, tmp_path / "export")), _output(module.transformer))


@each_family
def test_diffusers_loads_adapters_from_both_files(family_type: type[Family], tmp_path: Path) -> None:
    engine, module = _trained(family_type, lora=LORA)
    _assert_trained(module.transformer, family_type)
    expected = _output(module.transformer)
    export_transformer(engine, module, tmp_path, lora=LORA)
    one_file = {"comfyui.safetensors"} if family_type.published else set()
    assert {path.name for path in tmp_path.iterdir()} == {"peft", *one_file}

    by_peft = tiny_transformer(family_type)
    by_peft.load_lora_adapter(
        tmp_path / "peft", weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    assert torch.equal(_output(by_peft), expected)

    for name in one_file:
        by_pipeline = tiny_transformer(family_type)
        pipeline_around(by_pipeline, module.family).load_lora_weights(tmp_path / name)
        # Outputs of order 1; the scale inside B and the scale after B A x round differently in fp32.
        torch.testing.assert_close(_output(by_pipeline), expected, rtol=1e-6, atol=2e-6)


class Unpublished(Wan):
    """A family whose publication has names that nobody wrote down."""

    published: ClassVar[None] = None


def test_a_family_without_a_publication_exports_adapters_for_peft_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (Unpublished,))
    engine, module = _trained(Unpublished, lora=LORA)
    export_transformer(engine, module, tmp_path, lora=LORA)
    assert {path.name for path in tmp_path.iterdir()} == {"peft"}


def test_a_model_above_the_limit_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    engine, module = _trained(LTXVideo)
    export_transformer(engine, module, tmp_path, lora=None, shard_bytes=30_000)
    index = json.loads((tmp_path / f"{WEIGHTS}.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [
        f"{WEIGHTS}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(module.transformer.state_dict())
    sizes = {name: sum(tensor.nbytes for tensor in load_file(tmp_path / name).values()) for name in files}
    assert len(sizes) > 2
    assert max(sizes.values()) <= 30_000
    assert torch.equal(_output(_load(LTXVideo, tmp_path)), _output(module.transformer))


def test_an_earlier_export_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, module = _trained(LTXVideo)
    export_transformer(engine, module, tmp_path, lora=None, shard_bytes=30_000)
    export_transformer(engine, module, tmp_path, lora=None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", f"{WEIGHTS}.safetensors"}


def test_a_16_bit_run_exports_its_fp32_masters(tmp_path: Path) -> None:
    engine, module = _trained(LTXVideo, precision="bf16")
    export_transformer(engine, module, tmp_path, lora=None)
    masters = {state.name.removeprefix("transformer."): state.value for state in engine.parameter_states()}
    tensors = load_file(tmp_path / f"{WEIGHTS}.safetensors")
    assert set(tensors) == set(masters)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, masters[name])
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
