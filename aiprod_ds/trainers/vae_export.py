"""The trained VAE for others: a folder that `from_pretrained` loads, and the statistics of its latents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.files import write_atomically
from aiprod_ds.train.latent_statistics import LatentStatistics
from aiprod_ds.trainers.evaluation import HeldOutClip

_STATISTICS = ("latents_mean", "latents_std")


def export_vae(engine: Engine, vae: Any, clips: Iterable[HeldOutClip], folder: Path) -> None:
    """Writes safetensors, `config.json` (models of diffusers) and `latent_statistics.json`. Collective; the main rank writes.

    Where the model's configuration or its buffers hold `latents_mean` and `latents_std`, those of the clips take their place.

    Args:
        engine: In evaluation mode; its module holds the model as `vae`.
        vae: The model.
        clips: This rank's held-out clips through the model.
        folder: Made if it is missing.
    """
    own, together = LatentStatistics(), LatentStatistics()
    for clip in clips:
        own.update(clip.mean)
    for part in dist.gather_objects(own):
        together.merge(part)
    state = engine.module_state()
    if not dist.is_main():
        return
    found = together.compute()
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(vae, "save_config"):
        vae.save_config(folder)
        _fill_config(folder / "config.json", found)
    tensors = {name.removeprefix("vae."): tensor.contiguous() for name, tensor in state.items()}
    save_file(_filled(tensors, found), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    document = {"clips": together.num_clips, **found}
    write_atomically(folder / "latent_statistics.json", json.dumps(document, indent=1) + "\n")


def _fill_config(path: Path, found: Mapping[str, list[float]]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    known = {name: found[name] for name in _STATISTICS if name in values}
    if known:
        write_atomically(path, json.dumps({**values, **known}, indent=2) + "\n")


def _filled(tensors: dict[str, Tensor], found: Mapping[str, list[float]]) -> dict[str, Tensor]:
    """Returns the tensors with the buffers of the statistics replaced where they hold one number for each latent channel."""
    for name in _STATISTICS:
        if name in tensors and tensors[name].shape == (len(found[name]),):
            tensors[name] = torch.tensor(found[name], dtype=tensors[name].dtype)
    return tensors
