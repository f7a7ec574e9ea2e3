"""Files of others whose weights mean nothing without the numbers beside them, and merged files: right values
are computed here in numpy, in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_ds.cli import DONE, FAILED, main
from aiprod_ds.convert.independent import compare_plain
from aiprod_ds.convert.quantized import Dequantized
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import FAMILIES
from aiprod_ds.tensor_file import TensorFile
from aiprod_ds.testing.families import tiny_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE = "model.diffusion_model."
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def _config(family: type[Family], folder: Path, **changes: Any) -> Path:
    """The configuration alone."""
    with torch.device("meta"):
        module = getattr(diffusers, family.transformer_class)(**{**family.tiny_config(), **changes})
    module.save_config(folder)
    return folder / "config.json"


def _published(family: type[Family], *, prefix: str | None = None) -> dict[str, Tensor]:
    """The tiny model by the names of its publication, as a tool has them with its prefix."""
    published = family.published
    assert published is not None
    state = tiny_transformer(family).state_dict()
    names = {name: published.name_of(name).removeprefix(published.prefix) for name in state}
    given = published.prefix if prefix is None else prefix
    return {given + names[name]: value.clone() for name, value in state.items()}


def _matrices(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if value.dim() == 2 and name.endswith(".weight")]


def _expected(family: type[Family], numbers: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state by diffusers' names, found by diffusers' own function."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in numbers.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[family.transformer_class]["checkpoint_mapping_fn"]
    converted: dict[str, Tensor] = convert(checkpoint=tensors, config={})
    return converted


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("writer", ["scaled_fp8", "scaled_fp8_e5m2", "comfy_quant", "metadata", "rows"])
def test_scaled_fp8_becomes_the_numbers_that_it_stands_for(
    family: type[Family], writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _published(family, prefix=PIPELINE)
    numbers = {name: value.numpy().astype(np.float64) for name, value in tensors.items()}
    dtype = torch.float8_e5m2 if writer.endswith("e5m2") else torch.float8_e4m3fn
    metadata: dict[str, Any] = {}
    for name in _matrices(tensors):
        layer = name.removesuffix(".weight")
        scale = (
            torch.tensor(0.5) if writer != "rows" else torch.linspace(0.25, 2, len(tensors[name]))[:, None]
        )
        tensors[name] = (tensors[name] / scale).to(dtype)
        numbers[name] = tensors[name].float().numpy().astype(np.float64) * scale.numpy().astype(np.float64)
        old = writer.startswith("scaled_fp8")
        tensors[f"{layer}.{'scale_weight' if old else 'weight_scale'}"] = scale
        tensors[f"{layer}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(3.0)
        told = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        if writer == "comfy_quant":
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
        if writer == "metadata":
            metadata[layer.removeprefix(PIPELINE)] = told
    if writer.startswith("scaled_fp8"):
        tensors[f"{PIPELINE}scaled_fp8"] = torch.zeros(2, dtype=dtype)
    texts = {"_quantization_metadata": json.dumps({"layers": metadata})} if metadata else None
    save_file(tensors, tmp_path / "x.safetensors", metadata=texts)
    config = _config(family, tmp_path)
    assert _convert(tmp_path / "x.safetensors", tmp_path / "out", "--config", config, "--verify") == DONE
    shown = capsys.readouterr().out
    assert (
        f"dequantised to fp32: {len(_matrices(numbers_as_tensors(numbers)))} weights of scaled fp8" in shown
    )
    assert f"{len(numbers)} tensors as diffusers reads them" in shown
    assert _same(load_file(tmp_path / "out" / WEIGHTS), _expected(family, numbers))


def numbers_as_tensors(numbers: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The same as tensors."""
    return {name: torch.from_numpy(value) for name, value in numbers.items()}


def test_a_conversion_that_forgot_the_scales_is_not_verified(tmp_path: Path) -> None:
    """Both readings of the file share no code: weights half as large do not pass."""
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.scale_weight": torch.tensor(0.5)}, tmp_path / "x.safetensors")
    save_file({"a.weight": weight.float() * 0.5}, tmp_path / "right.safetensors")
    save_file({"a.weight": weight.float()}, tmp_path / "wrong.safetensors")
    paths = {name: (tmp_path / f"{name}.safetensors",) for name in ("x", "right", "wrong")}
    assert compare_plain(paths["x"], paths["right"], None).count == 1
    with pytest.raises(
        CheckpointError, match=r"a\.weight: must be what diffusers reads from .*, got other values"
    ):
        compare_plain(paths["x"], paths["wrong"], None)


def test_int8_that_says_so_and_of_bitsandbytes(tmp_path: Path) -> None:
    rows = torch.linspace(0.5, 2, 6)
    codes = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    told = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    save_file(
        {
            "a.weight": codes,
            "a.weight_scale": rows,
            "a.comfy_quant": told,
            "b.weight": codes.clone(),
            "b.SCB": rows.clone(),
            "b.weight_format": torch.zeros((), dtype=torch.uint8),
            "c.weight": codes.float(),
        },
        tmp_path / "x.safetensors",
    )
    read = Dequantized(TensorFile(tmp_path / "x.safetensors"))
    assert set(read) == {"a.weight", "b.weight", "c.weight"}
    exact = codes.numpy().astype(np.float64) * rows.numpy().astype(np.float64)[:, None]
    assert np.array_equal(read["a.weight"].numpy(), exact.astype(np.float32))
    assert np.array_equal(read["b.weight"].numpy(), (exact / 127).astype(np.float32))
    assert torch.equal(read["c.weight"], codes.float())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_four_bits_of_bitsandbytes(kind: str, is_nested: bool, tmp_path: Path) -> None:
    """A matrix whose last block is not whole; the first of two codes stands in the upper half of a byte."""
    generator = np.random.default_rng(0)
    shape, block = (5, 30), 64
    codes = generator.integers(0, 16, shape[0] * shape[1])
    table = np.linspace(-1, 1, 16).astype(np.float32)
    absmax = generator.random(3).astype(np.float32) + 0.5
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": shape}
    parts: dict[str, Tensor] = {}
    if is_nested:
        small = generator.integers(0, 256, 3).astype(np.uint8)
        nested = np.linspace(-1, 1, 256).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.75}
        parts = {
            "nested_absmax": torch.tensor([0.5]),
            "nested_quant_map": torch.from_numpy(nested),
            "absmax": torch.from_numpy(small),
        }
        absmax = (nested[small] * np.float32(0.5) + np.float32(0.75)).astype(np.float32)
    else:
        parts["absmax"] = torch.from_numpy(absmax)
    parts["quant_map"] = torch.from_numpy(table)
    parts[f"quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    packed = (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)
    tensors = {f"a.weight.{part}": value for part, value in parts.items()}
    tensors["a.weight"] = torch.from_numpy(packed)[:, None]
    save_file(tensors, tmp_path / "x.safetensors")
    read = Dequantized(TensorFile(tmp_path / "x.safetensors"))
    assert list(read) == ["a.weight"]
    expected = (table[codes] * absmax[np.arange(len(codes)) // block]).reshape(shape)
    assert np.array_equal(read["a.weight"].numpy(), expected)


FP8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
INT8 = torch.ones(4, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.weight": INT8, "a.weight_scale": torch.ones(4)},
            r"a\.weight: must be fp8, or int8 that says so, .*got int8 in the format None",
        ),
        (
            {
                "a.weight": INT8,
                "a.weight_scale": torch.ones(4),
                "a.comfy_quant": b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4}',
            },
            r"got int8 in the format int8_tensorwise, convrot",
        ),
        (
            {
                "a.weight": INT8.to(torch.uint8),
                "a.weight_scale": FP8,
                "a.comfy_quant": b'{"format": "nvfp4"}',
            },
            r"got uint8 in the format nvfp4",
        ),
        ({"a.weight": FP8, "a.comfy_quant": b'{"format": "float8_e4m3fn"}'}, r"must have a scale beside it"),
        ({"a.weight": FP8, "a.comfy_quant": b"{"}, r"must be JSON that names the format"),
        (
            {"a.weight": FP8, "a.scale_weight": torch.ones(2, 2)},
            r"a\.scale_weight: must be one number or one for each of the 4 rows of the weight, got \[2, 2\]",
        ),
        ({"a.scale_weight": torch.ones(1)}, r"a\.scale_weight: must have a weight beside it, got none"),
        ({"a.weight": FP8, "a.weight_scale_2": torch.ones(1)}, r"got a part of nvfp4"),
        ({"a.weight._data": INT8, "a.weight._scale": torch.ones(1)}, r"got a part of quanto"),
        ({"a.qweight": INT8}, r"got a part of GPTQ"),
        ({"a.weight": INT8, "a.SCB": torch.ones(3)}, r"must be an int8 matrix with SCB for each row"),
        (
            {"a.weight": INT8, "a.SCB": torch.ones(4), "a.weight_format": torch.ones((), dtype=torch.uint8)},
            r"a\.weight_format: must be 0",
        ),
        (
            {"a.weight": INT8.to(torch.uint8), "a.weight.quant_state.bitsandbytes__nf4": b"{}"},
            r"must be bitsandbytes' JSON",
        ),
        (
            {
                "a.weight": INT8.to(torch.uint8),
                "a.weight.quant_state.bitsandbytes__nf4": b'{"shape": [4, 8], "blocksize": 64, '
                b'"quant_type": "nf4"}',
            },
            r"must have all parts of nf4, got others for \['a\.weight\.absmax', 'a\.weight\.quant_map'\]",
        ),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(
    tensors: dict[str, Tensor | bytes], message: str, tmp_path: Path
) -> None:
    written = {
        name: torch.tensor(list(value), dtype=torch.uint8) if isinstance(value, bytes) else value
        for name, value in tensors.items()
    }
    save_file(written, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Dequantized(TensorFile(tmp_path / "x.safetensors"))


def test_fp8_alone_is_a_number(tmp_path: Path) -> None:
    save_file({"a.weight": FP8}, tmp_path / "x.safetensors")
    read = Dequantized(TensorFile(tmp_path / "x.safetensors"))
    assert read.told is None
    assert torch.equal(read["a.weight"].float(), FP8.float())


def test_gguf_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    assert _convert(tmp_path / "x.gguf", tmp_path / "out") == FAILED
    assert (
        "must be a safetensors file, got GGUF, whose weights are in blocks of few bits"
        in capsys.readouterr().err
    )


def _merged_file(path: Path, **more: Tensor) -> dict[str, Tensor]:
    """A single file of LTX-2 with the parts that its publication has beside the transformer, one of them in
    scaled fp8."""
    others = {
        "vae.decoder.conv_in.conv.weight": torch.randn(2, 2, 1, 1, 1),
        "vae.per_channel_statistics.mean-of-means": torch.randn(2),
        "audio_vae.decoder.conv_in.conv.weight": torch.randn(2, 2),
        "vocoder.conv_pre.weight": torch.randn(2, 2),
        "text_embedding_projection.aggregate_embed.weight": FP8,
        "text_embedding_projection.aggregate_embed.weight_scale": torch.tensor(0.5),
        f"{PIPELINE}video_embeddings_connector.learnable_registers": torch.randn(2, 2),
        f"{PIPELINE}audio_embeddings_connector.learnable_registers": torch.randn(2, 2),
    }
    formats = {"layers": {"text_embedding_projection.aggregate_embed": {"format": "float8_e4m3fn"}}}
    metadata = {"config": '{"vae": {}}', "_quantization_metadata": json.dumps(formats)}
    save_file({**_published(LTX2), **others, **more}, path, metadata=metadata)
    return others


@pytest.mark.slow
def test_parts_of_a_merged_file_are_counted_by_name_and_kept_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "x.safetensors", _config(LTX2, tmp_path)
    others = _merged_file(file)
    assert _convert(file, tmp_path / "out", "--config", config, "--verify") == DONE
    left = "left out: VAE 2 tensors, audio VAE 1 tensors, text connectors 4 tensors, vocoder 1 tensors"
    assert left in capsys.readouterr().out
    state = tiny_transformer(LTX2).state_dict()
    assert _same(load_file(tmp_path / "out" / WEIGHTS), state)

    again, single = tmp_path / "again.safetensors", ("--to", "single-file", "--verify")
    assert _convert(tmp_path / "out", again, *single, "--parts-from", file) == DONE
    kept = load_file(again)
    assert all(torch.equal(kept[name].float(), value.float()) for name, value in others.items())
    assert kept.keys() == load_file(file).keys()
    with safe_open(file, framework="pt") as first, safe_open(again, framework="pt") as second:
        assert first.metadata() | {"format": "pt"} == second.metadata()
    assert _convert(again, tmp_path / "back", "--config", config, "--verify") == DONE
    assert _same(load_file(tmp_path / "back" / WEIGHTS), state)

    capsys.readouterr()
    assert _convert(tmp_path / "out", tmp_path / "y", "--parts-from", file) == FAILED
    assert "--parts-from: must come with --to single-file, got diffusers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            f"{PIPELINE}transformer_blocks.0.attn1.to_q.weight_zero",
            "must hold nothing beside a weight of LTX2VideoTransformer3DModel that the model has not, got",
        ),
        (f"{PIPELINE}transformer_blocks.0.attn1.to_q.lora_A.weight", "must hold nothing beside a weight"),
        (f"{PIPELINE}transformer_blocks.2.attn1.to_q.weight", "known parts alone, got"),
        ("something.weight", "known parts alone, got something.weight"),
    ],
)
def test_what_is_of_no_known_part_is_an_error(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "x.safetensors", _config(LTX2, tmp_path)
    _merged_file(file, **{name: torch.ones(2)})
    assert _convert(file, tmp_path / "out", "--config", config) == FAILED
    assert message in capsys.readouterr().err
    allowed = _convert(file, tmp_path / "out", "--config", config, "--allow-unknown")
    if "nothing beside" in message:
        assert allowed == FAILED
    else:
        assert allowed == DONE
        assert "of no known part 1 tensors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", PIPELINE, "diffusion_model.", "model.", "module.", "_orig_mod."])
@each_family
def test_every_prefix_before_the_published_names_is_read(
    family: type[Family], prefix: str, tmp_path: Path
) -> None:
    save_file(_published(family, prefix=prefix), tmp_path / "x.safetensors")
    config = _config(family, tmp_path)
    assert _convert(tmp_path / "x.safetensors", tmp_path / "out", "--config", config) == DONE
    assert _same(load_file(tmp_path / "out" / WEIGHTS), tiny_transformer(family).state_dict())


@pytest.mark.slow
def test_ltx_2_3_has_its_published_names_that_diffusers_does_not_know(tmp_path: Path) -> None:
    changes = {"cross_attn_mod": True, "audio_cross_attn_mod": True}
    folder = tmp_path / "model"
    model = diffusers.LTX2VideoTransformer3DModel(**{**LTX2.tiny_config(), **changes})
    model.save_pretrained(folder)
    file = tmp_path / "x.safetensors"
    assert _convert(folder, file, "--to", "single-file", "--verify") == DONE
    names = load_file(file).keys()
    assert {
        f"{PIPELINE}prompt_adaln_single.linear.weight",
        f"{PIPELINE}audio_prompt_adaln_single.linear.bias",
    } <= names
    assert not any("prompt_adaln." in name for name in names)
    assert _convert(file, tmp_path / "back", "--config", folder, "--verify") == DONE
    assert _same(load_file(tmp_path / "back" / WEIGHTS), dict(model.state_dict()))


@pytest.mark.slow
def test_a_quantised_folder_is_written_without_its_quantisation(tmp_path: Path) -> None:
    model = tiny_transformer(LTXVideo)
    model.save_pretrained(tmp_path / "model")
    state, expected = load_file(tmp_path / "model" / WEIGHTS), {}
    for name in _matrices(state):
        codes = (state[name] / state[name].abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
        rows = state[name].abs().amax(1)
        state |= {name: codes, f"{name.removesuffix('.weight')}.SCB": rows}
        exact = codes.numpy().astype(np.float64) * rows.numpy().astype(np.float64)[:, None] / 127
        expected[name] = torch.from_numpy(exact.astype(np.float32))
    save_file(state, tmp_path / "model" / WEIGHTS)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert _convert(tmp_path / "model", tmp_path / "out", "--verify") == DONE
    back = load_file(tmp_path / "out" / WEIGHTS)
    for name, value in expected.items():
        assert torch.equal(back[name], value)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert isinstance(diffusers.LTXVideoTransformer3DModel.from_pretrained(tmp_path / "out"), torch.nn.Module)
