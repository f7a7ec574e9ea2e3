"""Tiny LoRA as the common tools write them: keys, alpha and settings of each.

What is written is A and B of random numbers at rank 4 and alpha 6, or alpha 4 where the tool has no other.
Key names are facts of each tool's public code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aiprod_ds.models.families.facts import PublishedNames

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
