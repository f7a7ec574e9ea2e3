"""LoRA files of every form: read to the function that was saved, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aiprod_ds.config.model import LoraConfig, LoraFileConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import CheckpointError, ConfigError
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES, find_family
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.models.lora import adapter_tensors, add_lora, merge_lora, save_comfyui, save_peft, start_from
from aiprod_ds.models.lora_files import LoraWeights, merge_into, read_lora
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.testing.families import (
    adapted_transformer,
    pipeline_around,
    tiny_batch,
    tiny_transformer,
    velocities,
)

STRIDES = ModelStrides(spatial=32, temporal=8)
CONFIG = LoraConfig(rank=4, alpha=6.0)
EVERY_LAYER = LoraConfig(rank=4, alpha=6.0, targets=("*",))
Q = "transformer_blocks.0.attn1.to_q"  # of LTX-Video
each_family = pytest.mark.parametrize("family_type", FAMILIES, ids=lambda family: family.name)


def _adapters(family_type: type[Family] = LTXVideo, config: LoraConfig = CONFIG) -> dict[str, Tensor]:
    return adapter_tensors(adapted_transformer(family_type, config).state_dict())


def _family(transformer: nn.Module) -> Family:
    return find_family(transformer, STRIDES)


def _read(family_type: type[Family], path: Path, alpha: float | None = None) -> LoraWeights:
    """Reads for a model without weights, as a plan does."""
    transformer = tiny_transformer(family_type)
    return read_lora(path, on_meta(transformer), _family(transformer), alpha=alpha)


def _merged(family_type: type[Family], lora: LoraWeights) -> nn.Module:
    transformer: nn.Module = tiny_transformer(family_type)
    merge_into(transformer, lora)
    return transformer


def _output(transformer: nn.Module) -> Tensor:
    family = _family(transformer)
    with torch.no_grad():
        return velocities(DiffusionModule(transformer.eval(), family), family, tiny_batch())


def _largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Returns the largest difference of a weight, over the largest weight."""
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    return max(
        float((states[0][name] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        for name, value in states[1].items()
    )


def _saved(tmp_path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


@each_family
def test_a_peft_folder_is_merged_to_the_bit(family_type: type[Family], tmp_path: Path) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    save_peft(adapter_tensors(wrapped.state_dict()), CONFIG, tmp_path)
    merge_lora(wrapped)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):  # alone, the file's metadata say alpha
        lora = _read(family_type, path)
        assert (lora.ranks(), set(lora.scales().values())) == ((4,), {1.5})
        assert _largest_difference(_merged(family_type, lora), wrapped) == 0.0
    assert _largest_difference(wrapped, tiny_transformer(family_type)) > 0.1


@each_family
def test_a_comfyui_file_is_merged(family_type: type[Family], tmp_path: Path) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    path = tmp_path / "lora.safetensors"
    save_comfyui(
        adapter_tensors(wrapped.state_dict()), CONFIG, path, original_name=_family(wrapped).original_name
    )
    lora = _read(family_type, path)
    assert set(lora.scales().values()) == {1.0}
    merge_lora(wrapped)
    # (1.5 B) A against 1.5 (B A) in fp32: some roundings of 6e-8, relative to the largest weight.
    assert _largest_difference(_merged(family_type, lora), wrapped) < 3e-7


@each_family
def test_what_a_pipeline_of_diffusers_saves_is_read(family_type: type[Family], tmp_path: Path) -> None:
    wrapped = adapted_transformer(family_type, CONFIG)
    adapters = adapter_tensors(wrapped.state_dict())
    pipeline = pipeline_around(tiny_transformer(family_type), _family(wrapped))
    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": ["to_q"]}
    pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=adapters, transformer_lora_adapter_metadata=settings
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert all(name.startswith("transformer.") for name in load_file(path))
    merge_lora(wrapped)
    assert _largest_difference(_merged(family_type, _read(family_type, path)), wrapped) == 0.0


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("form", ["down_up", "flat"])
def test_diffusers_and_this_reader_agree_on_files_of_others(
    family_type: type[Family], form: str, tmp_path: Path
) -> None:
    transformer = tiny_transformer(family_type)
    family = _family(transformer)
    tensors = {}
    for name, value in _adapters(family_type, EVERY_LAYER).items():
        layer, _, part = name.partition(".lora_")
        ending = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        original = family.original_name(layer)
        key = (
            f"diffusion_model.{original}" if form == "down_up" else f"lora_unet_{original.replace('.', '_')}"
        )
        tensors[f"{key}.{ending}"] = value
        tensors[f"{key}.alpha"] = torch.tensor(6.0)
    path = _saved(tmp_path, tensors)
    merged = _merged(family_type, _read(family_type, path))
    wrapped = adapted_transformer(family_type, EVERY_LAYER)
    merge_lora(wrapped)
    assert _largest_difference(merged, wrapped) == 0.0
    if family_type is Wan:  # diffusers converts both forms for it, where every layer of a block is adapted
        pipeline_around(transformer, family).load_lora_weights(path)
        # Outputs of order 1; W x + B A x against (W + B A) x rounds differently in fp32.
        torch.testing.assert_close(_output(transformer), _output(merged), rtol=1e-6, atol=2e-6)


@pytest.mark.slow
@each_family
def test_diffusers_loads_the_same_files_to_the_same_function(
    family_type: type[Family], tmp_path: Path
) -> None:
    adapters = _adapters(family_type)
    transformer = tiny_transformer(family_type)
    family = _family(transformer)
    save_peft(adapters, CONFIG, tmp_path / "peft")
    save_comfyui(adapters, CONFIG, tmp_path / "comfyui.safetensors", original_name=family.original_name)
    transformer.load_lora_adapter(
        tmp_path / "peft", weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    by_pipeline = tiny_transformer(family_type)
    pipeline_around(by_pipeline, family).load_lora_weights(tmp_path / "comfyui.safetensors")
    for theirs, path in ((transformer, tmp_path / "peft"), (by_pipeline, tmp_path / "comfyui.safetensors")):
        ours = _output(_merged(family_type, _read(family_type, path)))
        torch.testing.assert_close(ours, _output(theirs), rtol=1e-6, atol=2e-6)  # as above
        assert float((ours - _output(tiny_transformer(family_type))).abs().max()) > 1e-2


@each_family
def test_a_lora_goes_on_where_it_was(family_type: type[Family], tmp_path: Path) -> None:
    trained = adapted_transformer(family_type, CONFIG)
    save_peft(adapter_tensors(trained.state_dict()), CONFIG, tmp_path)
    again = tiny_transformer(family_type)
    add_lora(again, CONFIG, allowed=family_type.lora_targets, seed=5)
    start_from(again, _read(family_type, tmp_path))
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert {name for name, value in again.named_parameters() if value.requires_grad} == {
        name for name in again.state_dict() if ".lora_" in name
    }


def test_another_alpha_in_the_configuration_keeps_the_function(tmp_path: Path) -> None:
    trained = adapted_transformer(LTXVideo, CONFIG)
    save_peft(adapter_tensors(trained.state_dict()), CONFIG, tmp_path)
    again = tiny_transformer(LTXVideo)
    add_lora(again, LoraConfig(rank=4, alpha=2.0), allowed=LTXVideo.lora_targets, seed=5)
    start_from(again, _read(LTXVideo, tmp_path))
    ratio = (
        adapter_tensors(again.state_dict())[f"{Q}.lora_B.weight"]
        / adapter_tensors(trained.state_dict())[f"{Q}.lora_B.weight"]
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0))  # the docstring's worked number: 1.5 / 0.5
    torch.testing.assert_close(
        _output(again), _output(trained), rtol=1e-6, atol=2e-6
    )  # outputs of order 1, fp32


def test_a_lora_of_other_layers_or_ranks_is_not_continued(tmp_path: Path) -> None:
    save_peft(_adapters(), CONFIG, tmp_path)
    lora = _read(LTXVideo, tmp_path)
    for config, message in (
        (
            LoraConfig(rank=8),
            r"must have the rank of the configuration \(8\) in every layer, got 4\. Set lora\.rank",
        ),
        (
            LoraConfig(rank=4, targets=("to_q", "to_k", "to_v", "net.2")),
            r"got .*attn1\.to_out\.0, .* beside them and without .*net\.2",
        ),
    ):
        wrapped = tiny_transformer(LTXVideo)
        add_lora(wrapped, config, allowed=LTXVideo.lora_targets, seed=0)
        before = {name: value.clone() for name, value in wrapped.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            start_from(wrapped, lora)
        assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_mixed_ranks_are_merged_and_not_continued(tmp_path: Path) -> None:
    tensors = {f"transformer.{name}": value for name, value in _adapters().items()}
    tensors[f"transformer.{Q}.lora_A.weight"] = tensors[f"transformer.{Q}.lora_A.weight"][:2]
    tensors[f"transformer.{Q}.lora_B.weight"] = tensors[f"transformer.{Q}.lora_B.weight"][:, :2]
    lora = _read(LTXVideo, _saved(tmp_path, tensors), alpha=6.0)
    assert lora.ranks() == (2, 4)
    assert (lora.scales()[Q], lora.scales()[Q.replace("_q", "_k")]) == (
        3.0,
        1.5,
    )  # alpha over each layer's own rank
    change = _merged(LTXVideo, lora).get_parameter(f"{Q}.weight") - tiny_transformer(LTXVideo).get_parameter(
        f"{Q}.weight"
    )
    expected = 3.0 * (tensors[f"transformer.{Q}.lora_B.weight"] @ tensors[f"transformer.{Q}.lora_A.weight"])
    torch.testing.assert_close(
        change, expected, rtol=1e-5, atol=1e-6
    )  # the sum with W of order 1 rounds at 6e-8
    wrapped = tiny_transformer(LTXVideo)
    add_lora(wrapped, CONFIG, allowed=LTXVideo.lora_targets, seed=0)
    with pytest.raises(CheckpointError, match=r"in every layer, got 2, 4\."):
        start_from(wrapped, lora)


def test_a_16_bit_model_is_merged_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    save_peft(_adapters(), CONFIG, tmp_path)
    transformer, lora = tiny_transformer(LTXVideo).to(torch.bfloat16), _read(LTXVideo, tmp_path)
    before = transformer.get_parameter(f"{Q}.weight").detach().float()
    merge_into(transformer, lora)
    layer = lora.layers[Q]
    assert torch.equal(
        transformer.get_parameter(f"{Q}.weight"), (before + 1.5 * (layer.up @ layer.down)).bfloat16()
    )


@pytest.mark.parametrize(
    ("metadata", "own", "given", "expected"),
    [
        ({}, None, 2.0, 0.5),
        ({"alpha": "2"}, None, None, 0.5),
        ({"alpha": "2", "rank": "4", "alpha_is_folded": "true"}, None, None, 1.0),
        ({"alpha": "2"}, 8.0, None, 2.0),
        ({}, 8.0, None, 2.0),
        (
            {
                "lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 1, '
                '"text_encoder.r": 2}'
            },
            None,
            None,
            0.25,
        ),
    ],
)
def test_where_alpha_comes_from(
    metadata: dict[str, str], own: float | None, given: float | None, expected: float, tmp_path: Path
) -> None:
    tensors = {
        f"transformer.{Q}.lora_A.weight": torch.ones(4, 24),
        f"transformer.{Q}.lora_B.weight": torch.ones(24, 4),
    }
    if own is not None:
        tensors[f"transformer.{Q}.alpha"] = torch.tensor(own)
    assert _read(LTXVideo, _saved(tmp_path, tensors, **metadata), alpha=given).scales() == {Q: expected}


def test_missing_and_surplus_alphas_are_errors(tmp_path: Path) -> None:
    tensors = {
        f"transformer.{Q}.lora_A.weight": torch.ones(4, 24),
        f"transformer.{Q}.lora_B.weight": torch.ones(24, 4),
    }
    with pytest.raises(CheckpointError) as caught:
        _read(LTXVideo, _saved(tmp_path, tensors))
    assert str(caught.value) == (
        f"{tmp_path}/lora.safetensors: must say alpha, got none for {Q}. Give the one that it was trained "
        "with as `alpha`; `alpha: rank` is the rank (4), which is what readers that know no alpha use."
    )
    with pytest.raises(CheckpointError, match="alpha must not be given for a file that says its own, got 4"):
        _read(LTXVideo, _saved(tmp_path, tensors, alpha="4"), alpha=4.0)


def _replaced(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Returns what sets or removes parts of the first layer."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {**tensors, **{f"{Q}.{part.replace('__', '.')}": value for part, value in changes.items()}}
        return {name: value for name, value in changed.items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _replaced(dora_scale=torch.ones(24, 1)),
            rf"must be a LoRA, got DoRA of LyCORIS \({Q}\.dora_scale\)",
        ),
        (
            _replaced(lora_B__bias=torch.ones(23)),
            rf"the difference of {Q}\.bias must be finite .*\[24\], got \[23\]",
        ),
        (_replaced(hada_w1_a=torch.ones(24)), rf"got LoHa \({Q}\.hada_w1_a\)"),
        (_replaced(lokr_w1=torch.ones(24)), rf"got LoKr \({Q}\.lokr_w1\)"),
        (_replaced(lora_mid__weight=torch.ones(24)), r"got LoCon with a middle matrix"),
        (_replaced(diff=torch.ones(24)), rf"the difference of {Q}\.weight must be .*\[24, 24\], got \[24\]"),
        (_replaced(reshape_weight=torch.ones(2)), r"got a weight in place of the model's"),
        (
            _replaced(lora_magnitude_vector__weight=torch.ones(23)),
            r"the magnitudes of .* must be 24, got \[23\]",
        ),
        (_replaced(lora_B__weight=None), rf"must hold A and B of {Q}, got alpha and down alone"),
        (_replaced(lora_A__weight=None, lora_B__weight=None), rf"must hold A and B of {Q}, got alpha alone"),
        (
            _replaced(lora_A__weight=torch.ones(4, 48)),
            r"must be \[rank, 24\] and \[24, rank\], got \[4, 48\] and \[24, 4\]",
        ),
        (_replaced(lora_A__weight=torch.ones(3, 24)), r"got \[3, 24\] and \[24, 4\]"),
        (
            _replaced(lora_A__weight=torch.ones(0, 24), lora_B__weight=torch.ones(24, 0)),
            r"got \[0, 24\] and \[24, 0\]",
        ),
        (_replaced(lora_A__weight=torch.ones(4, 24, 1, 1)), r"got \[4, 24, 1, 1\] and \[24, 4\]"),
        (_replaced(lora_A__weight=torch.tensor(1.0)), r"got \[\] and \[24, 4\]"),
        (
            _replaced(lora_A__weight=torch.full((4, 24), torch.inf)),
            rf"must hold finite floating-point numbers, got others for {Q}",
        ),
        (
            _replaced(lora_A__weight=torch.ones(4, 24, dtype=torch.int8)),
            "must hold finite floating-point numbers",
        ),
        (_replaced(alpha=torch.ones(2)), rf"alpha of {Q} must be one number, got \[2\]"),
        (
            _replaced(lora_down__weight=torch.ones(4, 24)),
            rf"must name every tensor once, got a second one in {Q}\.lora_",
        ),
        (
            lambda tensors: {f"x.{name}": value for name, value in tensors.items()},
            r"for layers of LTXVideo.*3DModel, by the names of diffusers or of the publication, got x\.trans",
        ),
        (
            lambda _: _adapters(Wan),
            r"for layers of LTXVideoTransformer3DModel, .*, got blocks\.0\..* and 13 more\. They are of",
        ),
        (
            lambda tensors: {name.replace("blocks.0", "blocks.47"): value for name, value in tensors.items()},
            r"got blocks that this one has not \(transformer_blocks\.47.*It is of a larger variant",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    good = {
        f"{Q}.lora_A.weight": torch.ones(4, 24),
        f"{Q}.lora_B.weight": torch.ones(24, 4),
        f"{Q}.alpha": torch.tensor(4.0),
    }
    assert _read(LTXVideo, _saved(tmp_path, good)).scales() == {Q: 1.0}
    with pytest.raises(CheckpointError, match=message):
        _read(LTXVideo, _saved(tmp_path, change(good)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a safetensors file"),
        (b"\x80\x04\x95pickle", "must be a safetensors file"),
        (b"\xff" * 64, "must be a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "got no tensors"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "must be a safetensors file"),
    ],
)
def test_files_that_are_not_safetensors_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        _read(LTXVideo, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: must be a safetensors file"):
        _read(LTXVideo, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "must be the JSON of a PEFT adapter"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 100_000, "must be the JSON of a PEFT adapter"),
        ('{"peft_type": "LOHA", "r": 4, "lora_alpha": 1}', "must be a LoRA, got LOHA"),
        ('{"use_dora": true, "r": 4, "lora_alpha": 1}', "must hold the magnitudes of its DoRA, got none for"),
        (
            '{"alpha_pattern": {"to_q": "x"}, "r": 4, "lora_alpha": 1}',
            "alpha_pattern must be a finite number, got 'x'",
        ),
        ('{"alpha_pattern": [1], "r": 4, "lora_alpha": 1}', "alpha_pattern must map patterns to numbers"),
        (
            '{"init_lora_weights": "pissa_niter_16", "r": 4, "lora_alpha": 1}',
            "got init_lora_weights pissa_niter_16, whose base is not the model's own",
        ),
        ('{"r": 8, "lora_alpha": 1}', r"r must be the rank of all adapters \[4\], got 8"),
        ('{"r": 4, "lora_alpha": "x"}', "lora_alpha must be a finite number, got 'x'"),
        ('{"r": 4, "lora_alpha": NaN}', "lora_alpha must be a finite number, got nan"),
        ('{"r": 4, "lora_alpha": null}', "lora_alpha must be a finite number, got None"),
        ('{"r": 4}', "must say alpha"),
    ],
)
def test_folders_that_are_no_plain_lora_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    save_peft(_adapters(), CONFIG, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=message):
        _read(LTXVideo, tmp_path)


@pytest.mark.parametrize("told", ["{", "[]", "3"])
def test_metadata_that_are_no_settings_are_refused(told: str, tmp_path: Path) -> None:
    path = _saved(tmp_path, _adapters(), lora_adapter_metadata=told)
    with pytest.raises(CheckpointError, match="metadata lora_adapter_metadata must be a JSON object"):
        _read(LTXVideo, path)


def test_a_rank_pattern_is_the_tensors_own(tmp_path: Path) -> None:
    save_peft(_adapters(), CONFIG, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**settings, "r": 16, "rank_pattern": {".*": 4}})
    )
    assert set(_read(LTXVideo, tmp_path).scales().values()) == {1.5}


def test_the_settings_of_a_file() -> None:
    assert LoraFileConfig.model_validate({"path": "x"}).alpha is None
    assert LoraFileConfig.model_validate({"path": "x", "alpha": "rank"}).alpha == "rank"
    for wrong in (
        {},
        {"path": ""},
        {"path": "x", "alpha": 0.0},
        {"path": "x", "alpha": "ranks"},
        {"path": "x", "rank": 4},
    ):
        with pytest.raises(ConfigError, match="LoraFileConfig"):
            LoraFileConfig.model_validate(wrong)
