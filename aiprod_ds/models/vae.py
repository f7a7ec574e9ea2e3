"""What every VAE must offer, whatever it encodes, and what is changed in it before an engine takes it.

Called by the modules that wrap VAEs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from aiprod_ds.errors import ConfigError
from aiprod_ds.models.weight_norm import compute_weights_in_forward


def prepare_vae(vae: nn.Module) -> Any:
    """Returns the same module, with its hooks of weight normalisation replaced
    (`compute_weights_in_forward`).

    Raises:
        ConfigError: If it lacks `encode` or `decode`.
    """
    require_vae(vae)
    compute_weights_in_forward(vae)
    return vae


def require_vae(vae: nn.Module) -> None:
    """Checks what can be checked without running the model.

    Raises:
        ConfigError: If it lacks `encode` or `decode`.
    """
    for method in ("encode", "decode"):
        if not callable(getattr(vae, method, None)):
            raise ConfigError(
                f"model: a VAE must offer encode and decode, got {type(vae).__name__} without {method}. Name "
                "a VAE's class."
            )
