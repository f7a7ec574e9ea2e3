"""The trained transformer for others: a folder that `from_pretrained` loads, or its adapters as PEFT and as
ComfyUI read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.models.diffusion import TRANSFORMER, DiffusionModule

SHARD_BYTES = (
    10 * 10**9
)  # as diffusers cuts its own files: a reader holds one of them in memory beside the model
_FILE_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def export_transformer(
    engine: Engine,
    module: DiffusionModule,
    folder: Path,
    *,
    lora: LoraConfig | None,
    with_base: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes what was trained, in fp32 whatever it was computed in. Collective; the main rank writes.

    The whole model: `config.json` and safetensors as diffusers lays them out; above `shard_bytes` several of
    them and the index `diffusion_pytorch_model.safetensors.index.json`. Adapters: `peft/` for PEFT and
    diffusers, `comfyui.safetensors` for ComfyUI and for `load_lora_weights` of diffusers' pipelines if the
    family has `published` names; their base model, with `with_base`, as a whole model in `base/`.

    Args:
        engine: Holds `module`.
        module: What was trained.
        folder: Made if it is missing; its parent exists.
        lora: What the adapters were made with; None if the whole model was trained.
        with_base: Whether the base of the adapters is written too, because nobody else has it.
        shard_bytes: The most that one file of a whole model holds, unless a single tensor is larger.
    """
    state = engine.module_state()
    if not dist.is_main():
        return
    folder.mkdir(exist_ok=True)
    tensors = {name.removeprefix(TRANSFORMER): tensor for name, tensor in state.items()}
    if lora is None:
        _save_model(module, tensors, folder, shard_bytes)
        return
    if with_base:
        base = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in tensors.items()
            if ".lora_" not in name
        }
        _save_model(module, base, folder / "base", shard_bytes)
    from aiprod_ds.models.lora import (
        adapter_tensors,
        save_comfyui,
        save_peft,
    )  # imports peft, which takes seconds

    adapters = adapter_tensors(tensors)
    save_peft(adapters, lora, folder / "peft")
    if module.family.published is not None:
        path = folder / "comfyui.safetensors"
        save_comfyui(adapters, lora, path, original_name=module.family.original_name)


def _save_model(module: DiffusionModule, tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    transformer: Any = module.transformer
    folder.mkdir(exist_ok=True)
    transformer.save_config(folder)
    save_torch_state_dict(tensors, folder, filename_pattern=_FILE_PATTERN, max_shard_size=shard_bytes)
