"""LoRA of every common writer, for every family and precision: merged weights against their formula, and
against what diffusers reads of the same file, which the table of docs/tools.md says.

Key names are facts of each tool's public code; the numbers are random, at rank 4 and alpha 6, or alpha 4
where the tool has no other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from aiprod_ds.convert.independent import compare_lora, differences_of
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.facts import PublishedNames
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.models.lora import add_lora, start_from
from aiprod_ds.models.lora_files import LoraWeights, merge_into, read_lora
from aiprod_ds.models.lora_opened import Alpha
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.testing.families import pipeline_around, tiny_transformer

RANK, ALPHA = 4, 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """How a tool names and scales.

    Attributes:
        key: Prefix and form of the layer's name, of its name in diffusers and the publication's.
        parts: Endings of A and B.
        alpha: `tensor` beside every layer, `settings` of PEFT in a folder, `metadata` of diffusers; `rank`:
            PEFT's settings with the rank; `silent`: it is the rank and stands nowhere.
    """

    key: Callable[[str, str], str]
    parts: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    alpha: str = "silent"


def _flat(name: str) -> str:
    return name.replace(".", "_")


WRITERS: dict[str, Writer] = {
    "PEFT": Writer(key=lambda own, _: f"base_model.model.{own}", alpha="settings"),
    "diffusers": Writer(key=lambda own, _: f"transformer.{own}", alpha="metadata"),
    "diffusers around PEFT": Writer(key=lambda own, _: f"transformer.base_model.model.{own}"),
    "ComfyUI, ai-toolkit, ltx-trainer": Writer(key=lambda _, theirs: f"diffusion_model.{theirs}"),
    "ComfyUI with alpha": Writer(
        key=lambda _, theirs: f"diffusion_model.{theirs}",
        parts=("lora_down.weight", "lora_up.weight"),
        alpha="tensor",
    ),
    "whole checkpoint's names": Writer(key=lambda _, theirs: f"model.diffusion_model.{theirs}"),
    "diffusion-pipe": Writer(key=lambda _, theirs: f"diffusion_model.{theirs}", alpha="rank"),
    "DiffSynth-Studio": Writer(
        key=lambda _, theirs: theirs, parts=("lora_A.default.weight", "lora_B.default.weight")
    ),
    "musubi-tuner": Writer(
        key=lambda _, theirs: f"lora_unet_{_flat(theirs)}",
        parts=("lora_down.weight", "lora_up.weight"),
        alpha="tensor",
    ),
    "sd-scripts": Writer(
        key=lambda own, _: f"lora_transformer_{_flat(own)}",
        parts=("lora_down.weight", "lora_up.weight"),
        alpha="tensor",
    ),
    "LyCORIS (LoCon)": Writer(
        key=lambda own, _: f"lycoris_{_flat(own)}",
        parts=("lora_down.weight", "lora_up.weight"),
        alpha="tensor",
    ),
    "torch.compile": Writer(
        key=lambda own, _: f"_orig_mod.{own}", parts=("lora_A.mine.weight", "lora_B.mine.weight")
    ),
}


def layers_of(transformer: nn.Module, *, only_blocks: bool) -> list[str]:
    """Returns the Linear layers, of the repeated blocks or of the whole transformer."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if "blocks." in name] if only_blocks else linear


def adapters_of(transformer: nn.Module, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns random A and B by layer."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name in layers:
        module = transformer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        down = torch.randn(RANK, module.in_features, generator=generator)
        made[name] = down, torch.randn(module.out_features, RANK, generator=generator)
    return made


def write(
    writer: Writer,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    published: PublishedNames,
    dtype: torch.dtype,
    folder: Path,
) -> Path:
    """Writes what the tool would; returns the file, or the folder where settings stand beside it."""
    tensors: dict[str, Tensor] = {}
    for name, pair in adapters.items():
        key = writer.key(name, published.layer_of(name))
        for part, value in zip(writer.parts, pair, strict=True):
            tensors[f"{key}.{part}"] = value.to(dtype).contiguous()
        if writer.alpha == "tensor":
            tensors[f"{key}.alpha"] = torch.tensor(int(ALPHA))  # an integer, as some have it
    alpha = ALPHA if writer.alpha != "rank" else RANK
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": list(adapters)}
    metadata = {}
    if writer.alpha == "metadata":
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"transformer.{key}": value for key, value in settings.items() if key != "peft_type"}
        )
    if writer.alpha == "tensor":
        metadata |= {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", **metadata})
    if writer.alpha in ("settings", "rank"):
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder
    return folder / "adapter_model.safetensors"


TOOLS = Path(__file__).parents[3] / "docs" / "tools.md"
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
Q = "transformer_blocks.0.attn1.to_q"  # of LTX-Video


def _cells() -> Iterator[Any]:
    """Every writer for one family and precision; the others are more of the same."""
    for name in WRITERS:
        for family in FAMILIES:
            for precision in PRECISIONS:
                is_first = (family, precision) == (Wan, "bf16")
                marks = [] if is_first else [pytest.mark.exhaustive]
                yield pytest.param(
                    name, family, precision, id=f"{name}-{family.name}-{precision}", marks=marks
                )


def _documented() -> dict[tuple[str, str], str]:
    """What docs/tools.md says that diffusers reads, by writer and family."""
    lines = TOOLS.read_text(encoding="utf-8").splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("| written by"))
    heads = [cell.strip() for cell in lines[begin].strip("|").split("|")]
    cells = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        row = [cell.strip() for cell in line.strip("|").split("|")]
        cells |= {(row[0], head): cell for head, cell in zip(heads[2:], row[2:], strict=True)}
    return cells


def _read(family: type[Family], path: Path, alpha: Alpha = None, **options: Any) -> LoraWeights:
    return read_lora(path, on_meta(tiny_transformer(family)), family, alpha=alpha, **options)


def _merged(family: type[Family], lora: LoraWeights) -> dict[str, Tensor]:
    transformer = tiny_transformer(family)
    merge_into(transformer, lora)
    state: dict[str, Tensor] = transformer.state_dict()
    return state


def _saved(tmp_path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


def test_the_table_has_every_writer_and_family() -> None:
    expected = {(name, family.name) for name in WRITERS for family in FAMILIES}
    assert _documented().keys() == expected


@pytest.mark.slow
# Diffusers guesses layers from endings of names, and PEFT says that some have no adapter in the file.
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize(("name", "family", "precision"), list(_cells()))
def test_every_writer_is_merged_to_its_formula_and_as_diffusers_does(
    name: str, family: type[Family], precision: str, tmp_path: Path
) -> None:
    writer, dtype, base = WRITERS[name], PRECISIONS[precision], tiny_transformer(family)
    counts = []
    for only_blocks in (True, False):
        layers = layers_of(base, only_blocks=only_blocks)
        adapters = adapters_of(base, layers)
        path = write(writer, adapters, family.published, dtype, tmp_path / f"{only_blocks}")
        lora = _read(family, path, "rank" if writer.alpha == "silent" else None)
        merged, scale = _merged(family, lora), 1.0 if writer.alpha in ("silent", "rank") else 1.5
        for layer, (down, up) in adapters.items():
            weight = base.get_parameter(f"{layer}.weight")
            exact = weight.double() + scale * (up.to(dtype).double() @ down.to(dtype).double())
            # Sums of 4 products of order 1 in fp32.
            torch.testing.assert_close(
                merged[f"{layer}.weight"].double(), exact.detach(), rtol=1e-6, atol=4e-6
            )
        changed = {f"{layer}.weight" for layer in adapters}
        assert all(
            torch.equal(merged[key], value) for key, value in base.state_dict().items() if key not in changed
        )
        compared = compare_lora(lora, differences_of(path, on_meta(base), family))
        counts.append((compared.count, compared.total))
    assert _in_words(counts) == _documented()[name, family.name]


def _in_words(counts: list[tuple[int, int]]) -> str:
    """How the table says what diffusers reads of a LoRA of the blocks, and of one of all layers."""
    (blocks, all_blocks), (layers, all_layers) = counts
    if layers == all_layers and blocks == all_blocks:
        return "all"
    if layers:
        return f"{layers} of {all_layers}"
    return "blocks" if blocks == all_blocks else "-"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_merged_weights_are_those_of_diffusers_own_loader(family: type[Family], tmp_path: Path) -> None:
    """The whole way of a pipeline's user: load_lora_weights and fuse_lora."""
    base = tiny_transformer(family)
    adapters = adapters_of(base, layers_of(base, only_blocks=True))
    writer = WRITERS["ComfyUI, ai-toolkit, ltx-trainer"]
    path = write(writer, adapters, family.published, torch.bfloat16, tmp_path)
    theirs = tiny_transformer(family)
    strides: Any = _strides(family)
    pipeline_around(theirs, family.of(theirs, strides)).load_lora_weights(str(path))
    theirs.fuse_lora()
    theirs.unload_lora()
    ours = _merged(family, _read(family, path, "rank"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
    assert not torch.equal(
        ours[f"{next(iter(adapters))}.weight"], base.state_dict()[f"{next(iter(adapters))}.weight"]
    )


def _strides(family: type[Family]) -> Any:
    from aiprod_ds.curriculum.strides import ModelStrides

    return ModelStrides(spatial=16, temporal=4) if family is Wan else ModelStrides(spatial=32, temporal=8)


def test_ranks_that_differ_have_the_factor_one_each(tmp_path: Path) -> None:
    k = Q.replace("to_q", "to_k")
    tensors = {}
    for layer, rank in ((Q, 2), (k, 8)):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(rank, 24)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(24, rank)
    path = _saved(tmp_path, tensors)
    with pytest.raises(
        CheckpointError, match=r"`alpha: rank` is the rank of each layer, which is what readers"
    ):
        _read(LTXVideo, path)
    lora = _read(LTXVideo, path, "rank")
    assert lora.scales() == {Q: 1.0, k: 1.0}
    compared = compare_lora(lora, differences_of(path, on_meta(tiny_transformer(LTXVideo)), LTXVideo))
    assert (compared.count, compared.total) == (2, 2)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, 0.5),
        ({"lora_alpha": "8"}, 2.0),
        ({"network_alpha": "4"}, 1.0),
    ],
)
def test_alpha_of_metadata_is_read(metadata: dict[str, str], scale: float, tmp_path: Path) -> None:
    lora = _read(LTXVideo, _saved(tmp_path, _one(), **metadata))
    assert lora.scales() == {Q: scale}
    assert lora.assumed == {Q}  # diffusers does not look there


def test_the_metadata_none_is_no_alpha(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must say alpha"):
        _read(LTXVideo, _saved(tmp_path, _one(), ss_network_alpha="None"))


def _one(
    prefix: str = "diffusion_model.", layer: str = Q, rank: int = 4, width: int = 24
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{prefix}{layer}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"{prefix}{layer}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT 0.21.2 of its own lora_bias
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 12}},
        {"alpha_pattern": {"transformer_blocks.1.attn2.to_k": 1}, "use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"to_v": 2}},
    ],
    ids=str,
)
def test_peft_merges_its_own_variants_to_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    """The oracle is PEFT's merge_and_unload of the model that it saved."""
    config = PeftConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"], **settings)
    wrapped: Any = get_peft_model(tiny_transformer(LTXVideo), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path)
    lora = _read(LTXVideo, tmp_path)
    ours = _merged(LTXVideo, lora)
    theirs = wrapped.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # DoRA's norms and a factor of sqrt(rank): roundings of fp32
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=2e-6)
    assert any(
        not torch.equal(value, ours[name]) for name, value in tiny_transformer(LTXVideo).state_dict().items()
    )
    expected = 6 / math.sqrt(4) if settings.get("use_rslora") else None
    if expected is not None and "alpha_pattern" not in settings:
        assert lora.scales()[Q] == expected


def test_dora_and_differences_are_merged_and_not_trained_on(tmp_path: Path) -> None:
    dora = {**_one("transformer."), f"transformer.{Q}.lora_magnitude_vector": torch.ones(24)}
    lora = _read(LTXVideo, _saved(tmp_path, dora), "rank")
    rows = _merged(LTXVideo, lora)[f"{Q}.weight"]
    torch.testing.assert_close(
        torch.linalg.vector_norm(rows, dim=1), torch.ones(24)
    )  # norms are the magnitudes
    wrapped = tiny_transformer(LTXVideo)
    from aiprod_ds.config.model import LoraConfig

    add_lora(wrapped, LoraConfig(rank=4, targets=(Q,)), allowed=LTXVideo.lora_targets, seed=0)
    with pytest.raises(CheckpointError, match=rf"must be A and B alone to be trained on, got DoRA of {Q}"):
        start_from(wrapped, lora)


def test_differences_of_weights_biases_and_norms_are_added(tmp_path: Path) -> None:
    """As the step-distilled LoRA of Wan have them; diffusers drops those of norms."""
    generator = torch.Generator().manual_seed(2)
    own = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
        "time_embedding.0.diff": "condition_embedder.time_embedder.linear_1.weight",
    }
    base = tiny_transformer(Wan).state_dict()
    tensors = {
        f"diffusion_model.{key}": torch.randn(base[name].shape, generator=generator)
        for key, name in own.items()
    }
    adapter = _one(layer="blocks.0.self_attn.q")
    merged = _merged(Wan, _read(Wan, _saved(tmp_path, {**tensors, **adapter}), "rank"))
    for key, name in own.items():
        assert torch.equal(merged[name], base[name] + tensors[f"diffusion_model.{key}"])
    down, up = adapter.values()
    torch.testing.assert_close(
        merged["blocks.0.attn1.to_q.weight"], base["blocks.0.attn1.to_q.weight"] + up @ down
    )
    changed = {*own.values(), "blocks.0.attn1.to_q.weight"}
    assert {name for name in base if not torch.equal(merged[name], base[name])} == changed


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer.base_model.model.", "_orig_mod."])
def test_prefixes_stack_and_compiled_blocks_are_known(prefix: str, tmp_path: Path) -> None:
    compiled = Q.replace("blocks.0.", "blocks.0._orig_mod.")
    lora = _read(LTXVideo, _saved(tmp_path, _one(f"model.{prefix}", compiled)), "rank")
    assert list(lora.layers) == [Q]


def test_two_adapters_in_one_file_are_refused_by_their_names(tmp_path: Path) -> None:
    tensors = {}
    for name in ("style", "motion"):
        for key, value in _one("").items():
            tensors[key.replace(".weight", f".{name}.weight")] = value.clone()
    with pytest.raises(CheckpointError, match=r"must hold one adapter, got 'motion', 'style'\."):
        _read(LTXVideo, _saved(tmp_path, tensors), "rank")


def test_an_image_to_video_lora_is_named_as_such(tmp_path: Path) -> None:
    tensors = {**_one(layer="blocks.0.cross_attn.k"), **_one(layer="blocks.0.cross_attn.k_img")}
    path = _saved(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"got those of an image-to-video model \(blocks\.0\.cross"):
        _read(Wan, path, "rank")
    config = {**Wan.tiny_config(), "image_dim": 8, "added_kv_proj_dim": 24}
    with torch.device("meta"):
        image_to_video = diffusers.WanTransformer3DModel(**config)
    lora = read_lora(path, image_to_video, Wan, alpha="rank")
    assert set(lora.layers) == {"blocks.0.attn2.to_k", "blocks.0.attn2.add_k_proj"}


def test_connectors_and_text_encoders_are_counted_and_not_merged(tmp_path: Path) -> None:
    others = {
        "text_embedding_projection.aggregate_embed.lora_A.weight": torch.ones(4, 8),
        "diffusion_model.video_embeddings_connector.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 8),
        "text_encoder.layers.0.q.lora_A.weight": torch.ones(4, 8),
        "lora_te1_text_model_encoder_layers_0.lora_down.weight": torch.ones(4, 8),
    }
    lora = _read(LTX2, _saved(tmp_path, {**_one(), **others}), "rank")
    assert lora.others == {"text connectors": 2, "text encoder": 2}
    assert list(lora.layers) == [Q]
    with pytest.raises(
        CheckpointError, match=r"must adapt layers of .*, got 2 tensors of text connectors, 2 tensors"
    ):
        _read(LTX2, _saved(tmp_path, others), "rank")


def test_unknown_keys_are_an_error_unless_they_are_allowed(tmp_path: Path) -> None:
    path = _saved(tmp_path, {**_one(), "something.strange": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"got something\.strange\. They are of another model, or their writer"
    ):
        _read(LTXVideo, path, "rank")
    lora = _read(LTXVideo, path, "rank", allow_unknown=True)
    assert lora.others == {"nothing that is known": 1}


def test_top_level_layers_of_ltx_2_have_one_table_with_its_single_file(tmp_path: Path) -> None:
    names = {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "adaln_single.linear": "time_embed.linear",
        "audio_adaln_single.linear": "audio_time_embed.linear",
        "av_ca_video_scale_shift_adaln_single.linear": "av_cross_attn_video_scale_shift.linear",
        "av_ca_a2v_gate_adaln_single.linear": "av_cross_attn_video_a2v_gate.linear",
        "av_ca_v2a_gate_adaln_single.linear": "av_cross_attn_audio_v2a_gate.linear",
        "proj_out": "proj_out",
    }
    model = tiny_transformer(LTX2)
    for written in (
        lambda name: f"diffusion_model.{name}",
        lambda name: f"lora_unet_{name.replace('.', '_')}",
    ):
        tensors = {}
        for theirs, own in names.items():
            module = model.get_submodule(own)
            assert isinstance(module, nn.Linear)
            tensors[f"{written(theirs)}.lora_down.weight"] = torch.ones(2, module.in_features)
            tensors[f"{written(theirs)}.lora_up.weight"] = torch.ones(module.out_features, 2)
        assert set(_read(LTX2, _saved(tmp_path, tensors), "rank").layers) == set(names.values())


def test_no_published_name_of_a_family_is_another_layers_name_in_diffusers() -> None:
    """Otherwise a key would be read as the wrong one of two layers."""
    for family in FAMILIES:
        assert family.published is not None
        modules = {re.sub(r"\.weight$", "", name) for name in tiny_transformer(family).state_dict()}
        both = {name for name in modules if family.published.layer_of(name) != name}
        assert not {family.published.layer_of(name) for name in both} & modules
