"""What a file or folder is, by names and headers alone: nothing is unpickled to find out.

Called by `inspect` and `sources`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aiprod_ds.checkpoint.manifest import MANIFEST
from aiprod_ds.convert.deepspeed_folder import find_tag_folder
from aiprod_ds.convert.distributed_folder import find_distributed_folder
from aiprod_ds.convert.weights_folder import DIFFUSERS_STEM, PLAIN_STEM, open_tensors
from aiprod_ds.errors import CheckpointError
from aiprod_ds.models.lora_keys import other_kind, parse_key

Kind = Literal["run", "checkpoint", "weights", "tensors", "lora", "deepspeed", "distributed"]
IN_WORDS: dict[Kind, str] = {
    "run": "run folder",
    "checkpoint": "checkpoint of a run",
    "weights": "folder of weights",
    "tensors": "safetensors file",
    "lora": "LoRA",
    "deepspeed": "checkpoint of DeepSpeed",
    "distributed": "checkpoint of torch.distributed.checkpoint",
}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found.

    Attributes:
        path: The folder or file that holds it, which may lie below the one that was named.
    """

    kind: Kind
    path: Path


def identify(path: Path) -> Found:
    """Returns what `path` is.

    Raises:
        CheckpointError: If it is missing or nothing that is known; names what was looked for.
    """
    try:
        if path.is_dir():
            return _folder(path)
    except OSError as error:
        raise CheckpointError(f"{path}: must be readable, got {error}. Check its permissions.") from error
    if not path.exists():
        raise CheckpointError(f"{path}: must exist, got no such file or folder. Check the path.")
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: must be a safetensors file, got {path.suffix}, which is usually a pickle and can run "
            "any program. "
            "Name the folder of a DeepSpeed checkpoint, or save the weights as safetensors."
        )
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path}: must be a safetensors file, got GGUF, whose weights are in blocks of few bits. Take "
            "the model in bf16, or dequantise it with the tools of its writer."
        )
    with open_tensors(path) as file:
        is_lora = _is_lora(file)
    return Found(kind="lora" if is_lora else "tensors", path=path)


def _is_lora(names: Collection[str]) -> bool:
    """Whether most names are those of adapters: a few may be of a writer that is not known."""
    num_adapters = sum(parse_key(name) is not None or other_kind(name) is not None for name in names)
    return 0 < num_adapters >= len(names) / 2


def _folder(path: Path) -> Found:
    if (path / "checkpoints").is_dir():
        return Found(kind="run", path=path)
    if (path / MANIFEST).is_file():
        return Found(kind="checkpoint", path=path)
    for adapters in (path, path / "peft"):  # as a run exports it
        if (adapters / "adapter_config.json").is_file():
            return Found(kind="lora", path=adapters)
    for stem in (DIFFUSERS_STEM, PLAIN_STEM):
        if (path / f"{stem}.safetensors").is_file() or (path / f"{stem}.safetensors.index.json").is_file():
            return Found(kind="weights", path=path)
    if (tag := find_tag_folder(path)) is not None:
        return Found(kind="deepspeed", path=tag)
    if (distributed := find_distributed_folder(path)) is not None:
        return Found(kind="distributed", path=distributed)
    if (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path}: must be one model, got a pipeline of several. Name its folder, such as "
            f"{path}/transformer."
        )
    raise CheckpointError(
        f"{path}: must be a run folder, a checkpoint, weights (diffusers' layout or a safetensors file), a "
        "LoRA, or a checkpoint "
        "of DeepSpeed or torch.distributed.checkpoint, got none of these. Name the folder that holds the "
        "files."
    )
