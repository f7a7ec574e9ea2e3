"""Adapters: what is wrapped and trained, merging, and files that PEFT and diffusers read back to the same
function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.families.tokens import TokenGrid
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.models.lora import (
    adapter_tensors,
    add_lora,
    load_lora,
    merge_lora,
    merged_state,
    save_comfyui,
    save_peft,
)
from aiprod_ds.testing.families import (
    adapted_transformer,
    pipeline_around,
    tiny_batch,
    tiny_transformer,
    velocities,
)
from aiprod_ds.train.engines import decay_groups

STRIDES = ModelStrides(spatial=32, temporal=8)
CONFIG = LoraConfig(rank=4, alpha=6.0, targets=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"))
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)


def _output(transformer: nn.Module) -> Tensor:
    """Returns all velocities of a fixed batch, flattened."""
    family = find_family(transformer, STRIDES)
    with torch.no_grad():
        return velocities(DiffusionModule(transformer, family), family, tiny_batch())


def _assert_same_function(actual: Tensor, expected: Tensor) -> None:
    # Outputs of order 1; W x + B A x against (W + B A) x, or a scale inside B, round differently in fp32.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)


@each_family
def test_the_function_is_unchanged_at_the_start(family_type: type[Any]) -> None:
    transformer = tiny_transformer(family_type)
    before = _output(transformer)
    names = add_lora(transformer, CONFIG, allowed=family_type.lora_targets, seed=0)
    assert torch.equal(_output(transformer), before)
    linear = {
        name
        for name, module in tiny_transformer(family_type).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert set(names) == {
        name for name in linear if "blocks." in name
    }  # the patterns name every Linear of these blocks
    assert not torch.allclose(_output(adapted_transformer(family_type, CONFIG)), before, atol=1e-2)


@each_family
def test_only_adapters_are_trained_and_all_of_them(family_type: type[Any]) -> None:
    transformer = adapted_transformer(family_type, CONFIG)
    assert {name for name, value in transformer.named_parameters() if value.requires_grad} == {
        name for name in transformer.state_dict() if ".lora_" in name
    }
    with torch.enable_grad():
        family = find_family(transformer, STRIDES)
        tensors = {
            "latents": torch.ones(1, 4, 2, 4, 4),
            "audio_latents": torch.ones(1, 2, 7, 4),
            "prompt_embeds": torch.randn(1, 6, 16),
            "fps": torch.ones(1),
        }
        tokens = family.tokens(tensors)
        noisy = {name: torch.randn(part.values.shape) for name, part in tokens.items()}
        levels = {name: torch.full((1, 1), 0.5) for name in tokens}
        velocity = family.forward(
            transformer, noisy, levels, tensors, {name: part.grid for name, part in tokens.items()}
        )
        torch.stack([values.square().mean() for values in velocity.values()]).sum().backward()
    assert all(
        (value.grad is not None and bool(value.grad.any())) == value.requires_grad
        for value in transformer.parameters()
    )


def test_adapters_depend_on_the_seed_alone() -> None:
    def draw(seed: int) -> Tensor:
        transformer = tiny_transformer(Wan)
        torch.manual_seed(torch.seed() % 2**32)
        add_lora(transformer, CONFIG, allowed=Wan.lora_targets, seed=seed)
        return torch.cat([value.flatten() for value in adapter_tensors(transformer.state_dict()).values()])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_adding_leaves_the_global_random_state_alone() -> None:
    transformer = tiny_transformer(LTXVideo)
    before = torch.get_rng_state()
    add_lora(transformer, CONFIG, allowed=LTXVideo.lora_targets, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_planning_takes_no_memory() -> None:
    with torch.device("meta"):
        transformer = tiny_transformer(LTXVideo)
    add_lora(transformer, CONFIG, allowed=LTXVideo.lora_targets, seed=0)
    assert all(parameter.is_meta for parameter in transformer.parameters())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("attn1.to_q",), {"transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"}),
        (
            ("transformer_blocks.1.attn?.to_[kv]",),
            {f"transformer_blocks.1.attn{n}.to_{p}" for n in (1, 2) for p in "kv"},
        ),
        (
            ("0.ff.*", "1.ff.net.2"),
            {f"transformer_blocks.{n}" for n in ("0.ff.net.0.proj", "0.ff.net.2", "1.ff.net.2")},
        ),
        (("*",), None),
    ],
)
def test_patterns_choose_layers(targets: tuple[str, ...], expected: set[str] | None) -> None:
    transformer = tiny_transformer(LTXVideo)
    names = add_lora(transformer, LoraConfig(rank=2, targets=targets), allowed=LTXVideo.lora_targets, seed=0)
    if expected is None:
        assert len(names) == 2 * (
            8 + 2
        )  # two attentions of four layers and two of the feed-forward, in two blocks
    else:
        assert set(names) == expected


def test_patterns_that_match_nothing_are_reported_together() -> None:
    config = LoraConfig(targets=("to_q", "query", "proj_out", "to_out"))
    with pytest.raises(ConfigError) as caught:
        add_lora(tiny_transformer(LTXVideo), config, allowed=LTXVideo.lora_targets, seed=0)
    unknown, outside, incomplete = caught.value.problems
    assert unknown == (
        "lora.targets[1]: must match a Linear layer of LTXVideoTransformer3DModel, got 'query'. "
        "Use one of: net.2, proj, to_k, to_out.0, to_q, to_v."
    )
    assert outside == (
        "lora.targets[2]: must match a Linear layer inside transformer_blocks.*, got 'proj_out'. "
        "It only matches layers like proj_out. Take it out."
    )
    assert incomplete.endswith("got 'to_out'. Did you mean 'to_out.0'?")


@each_family
def test_merging_keeps_the_function(family_type: type[Any]) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    expected = _output(wrapped)
    plain = tiny_transformer(family_type)
    plain.load_state_dict(merged_state(wrapped.state_dict(), CONFIG.scale))
    _assert_same_function(_output(plain), expected)

    merge_lora(wrapped)
    assert {name: value.shape for name, value in wrapped.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert all(parameter.requires_grad for parameter in wrapped.parameters())
    _assert_same_function(_output(wrapped), expected)


def test_a_16_bit_base_is_merged_in_fp32() -> None:
    wrapped = adapted_transformer(LTXVideo, CONFIG).to(torch.bfloat16)
    state = merged_state(wrapped.state_dict(), CONFIG.scale)
    layer = "transformer_blocks.0.attn1.to_q"
    double = {name: value.double() for name, value in wrapped.state_dict().items()}
    expected = double[f"{layer}.base_layer.weight"] + 1.5 * (
        double[f"{layer}.lora_B.default.weight"] @ double[f"{layer}.lora_A.default.weight"]
    )
    assert state[f"{layer}.weight"].dtype == torch.float32
    torch.testing.assert_close(
        state[f"{layer}.weight"].double(), expected, rtol=1e-6, atol=1e-6
    )  # oracle: fp64
    assert state["proj_in.weight"].dtype == torch.bfloat16


def test_the_worked_number_of_merging() -> None:
    state = {
        "x.base_layer.weight": torch.ones(1, 1),
        "x.base_layer.bias": torch.zeros(1),
        "x.lora_A.default.weight": torch.full((1, 1), 2.0),
        "x.lora_B.default.weight": torch.full((1, 1), 3.0),
    }
    merged = merged_state(state, 0.5)
    assert merged["x.weight"].item() == 4.0
    assert set(merged) == {"x.weight", "x.bias"}


@each_family
def test_peft_and_diffusers_read_the_peft_folder(family_type: type[Any], tmp_path: Path) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    save_peft(adapter_tensors(wrapped.state_dict()), CONFIG, tmp_path)

    by_peft = PeftModel.from_pretrained(tiny_transformer(family_type), str(tmp_path))
    assert torch.equal(_output(by_peft.base_model.model), _output(wrapped))

    by_diffusers = tiny_transformer(family_type)
    by_diffusers.load_lora_adapter(
        tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    assert torch.equal(_output(by_diffusers), _output(wrapped))


@pytest.mark.slow
@each_family
def test_diffusers_pipelines_read_the_comfyui_file(family_type: type[Any], tmp_path: Path) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    family = find_family(wrapped, STRIDES)
    path = tmp_path / "lora.safetensors"
    save_comfyui(adapter_tensors(wrapped.state_dict()), CONFIG, path, original_name=family.original_name)

    plain = tiny_transformer(family_type)
    pipeline_around(plain, family).load_lora_weights(path)
    _assert_same_function(_output(plain), _output(wrapped))


def test_the_comfyui_file_folds_alpha_and_says_so(tmp_path: Path) -> None:
    wrapped = adapted_transformer(LTXVideo, CONFIG)
    adapters = adapter_tensors(wrapped.state_dict())
    save_comfyui(
        adapters,
        CONFIG,
        tmp_path / "lora.safetensors",
        original_name=LTXVideo.of(wrapped, STRIDES).original_name,
    )
    layer = "transformer_blocks.1.attn2.to_out.0"
    tensors = load_file(tmp_path / "lora.safetensors")
    assert len(tensors) == len(adapters)
    assert torch.equal(tensors[f"diffusion_model.{layer}.lora_A.weight"], adapters[f"{layer}.lora_A.weight"])
    assert torch.equal(
        tensors[f"diffusion_model.{layer}.lora_B.weight"], adapters[f"{layer}.lora_B.weight"] * 1.5
    )
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "rank": "4", "alpha": "6.0", "alpha_is_folded": "true"}


def test_a_saved_adapter_is_loaded_and_goes_on_training(tmp_path: Path) -> None:
    wrapped = adapted_transformer(LTX2, CONFIG)
    save_peft(adapter_tensors(wrapped.state_dict()), CONFIG, tmp_path)
    plain = tiny_transformer(LTX2)
    config = load_lora(plain, tmp_path, allowed=LTX2.lora_targets)
    assert (config.rank, config.alpha, config.dropout) == (4, 6.0, 0.0)
    assert torch.equal(_output(plain), _output(wrapped))
    trained = {name for name, value in plain.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in wrapped.named_parameters() if value.requires_grad}


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"must hold adapter_config\.json and adapter_model\.safetensors"
    ):
        load_lora(tiny_transformer(LTXVideo), tmp_path, allowed=LTXVideo.lora_targets)

    adapters = adapter_tensors(adapted_transformer(LTXVideo, CONFIG).state_dict())
    save_peft(adapters, CONFIG, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"must fit WanTransformer3DModel\. lora\.targets\[0\]: must match"
    ):
        load_lora(tiny_transformer(Wan), tmp_path, allowed=Wan.lora_targets)

    half, wide = dict(adapters), dict(adapters)
    del half["transformer_blocks.0.attn1.to_q.lora_B.weight"]
    wide["transformer_blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 48)
    for tensors, message in (
        (half, r"lora_B\.weight none instead of \[24, 4\]"),
        (wide, r"lora_A\.weight \[4, 48\] instead of \[4, 24\]"),
    ):
        save_peft(tensors, CONFIG, tmp_path)
        with pytest.raises(
            CheckpointError, match=rf"must hold the adapters' shapes in LTX.*to_q\.{message}\. Take"
        ):
            load_lora(tiny_transformer(LTXVideo), tmp_path, allowed=LTXVideo.lora_targets)

    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "use_dora": True}))
    with pytest.raises(CheckpointError, match="must be a plain LoRA adapter of one rank, got use_dora"):
        load_lora(tiny_transformer(LTXVideo), tmp_path, allowed=LTXVideo.lora_targets)


def test_an_engine_updates_fp32_adapters_on_a_frozen_16_bit_base() -> None:
    module = DiffusionModule(
        adapted_transformer(LTXVideo, CONFIG), find_family(tiny_transformer(LTXVideo), STRIDES)
    )
    base = {name: value.bfloat16() for name, value in module.state_dict().items() if ".lora_" not in name}
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OptimizerConfig(),
        settings=parse_deepspeed_settings(
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "test"
        ),
        micro_batch_size=1,
        accumulation=1,
    )
    engine.set_learning_rate(1e-6)  # too little for bf16 to show
    before = engine.module_state()
    grid = TokenGrid(latent_shape=(4, 1, 2, 2), patch=(1, 1, 1))
    tensors = {"prompt_embeds": torch.randn(1, 3, 16), "fps": torch.ones(1)}
    velocity = engine(
        {"video": torch.randn(1, 4, 4)}, {"video": torch.full((1, 1), 0.5)}, tensors, {"video": grid}
    )
    engine.backward(velocity["video"].float().square().mean())
    engine.step()

    after = engine.module_state()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    adapters = adapter_tensors({name.removeprefix("transformer."): value for name, value in after.items()})
    assert all(
        after[name].dtype == torch.float32 and not torch.equal(after[name], before[name])
        for name in after
        if ".lora_" in name
    )
    assert len(adapters) == 2 * 20


def test_dropout_drops_inputs_of_adapters_in_training_only() -> None:
    config = LoraConfig(rank=4, dropout=0.5)
    transformer = adapted_transformer(LTXVideo, config)
    assert not torch.equal(_output(transformer.train()), _output(transformer))
    assert torch.equal(_output(transformer.eval()), _output(transformer))


def test_the_scale_is_alpha_over_rank() -> None:
    assert LoraConfig(rank=32, alpha=16.0).scale == 0.5
    assert LoraConfig(rank=8).scale == 1.0


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}, {"ranks": 4}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoraConfig.model_validate(wrong)
