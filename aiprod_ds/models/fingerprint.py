"""What a network is, as one hash: its class, its configuration and its weights. Latents carry it, so that
they are not mixed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from aiprod_ds import progress


def module_fingerprint(module: nn.Module, *settings: Any) -> str:
    """Returns a SHA-256 as 64 hexadecimal digits.

    Args:
        module: Of any library. What its configuration says about paths and versions does not count, the type
            of its weights does.
        settings: Whatever else decides what comes out; anything that JSON can hold.
    """
    digest = hashlib.sha256()
    digest.update(
        json.dumps([type(module).__name__, _config(module), settings], sort_keys=True, default=str).encode()
    )
    tensors = sorted(module.state_dict().items())
    title = f"hashing the weights of {type(module).__name__}:"
    for name, tensor in progress.steps(tensors, title, len(tensors)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name != "transformers_version"
    }
