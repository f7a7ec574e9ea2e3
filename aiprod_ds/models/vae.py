"""What every VAE must offer, whatever it encodes, what is changed in it before an engine takes it, and what
the modules that wrap VAEs do alike: freezing of parts.

Called by `video_vae.py`, `audio_vae.py` and `mel_vae.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from aiprod_ds.errors import ConfigError
from aiprod_ds.models.weight_norm import compute_weights_in_forward


class WrappedVAE(nn.Module):
    """A VAE in training, all of it or a part.

    Its hooks of weight normalisation are replaced (`compute_weights_in_forward`).

    Attributes:
        vae: The model.
        keeps_latents: Whether nothing is trained that latents depend on: encoding then takes no graph.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = prepare_vae(vae)
        self.keeps_latents = False
        self._held: tuple[str, ...] = ()

    def freeze(self, frozen: Collection[str], *, latents_depend_on: Collection[str]) -> None:
        """Trains all parameters but `frozen`. Call it while no engine holds the module.

        Where that leaves the latents of every clip what they are, the modules that make them stay in
        evaluation mode, so that no running statistics and no dropout change them either.

        Args:
            frozen: Names as in `named_parameters()`.
            latents_depend_on: Likewise; empty if that is not known.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)
        known = set(latents_depend_on)
        self.keeps_latents = bool(known) and known <= set(frozen)
        self._held = tuple(_holding_only(self, known)) if self.keeps_latents else ()
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Puts the module in training mode, but for what makes latents that are kept."""
        super().train(mode)
        for name in self._held:
            self.get_submodule(name).train(mode=False)
        return self

    def encoded(self, clips: Tensor) -> Any:
        """Returns what the model's `encode` returns."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.keeps_latents):
            return self.vae.encode(clips)


def _holding_only(module: nn.Module, names: set[str]) -> list[str]:
    """Returns the modules that have parameters, and none but `names`."""
    found = []
    for path, part in module.named_modules():
        own = [f"{path}.{name}" for name, _ in part.named_parameters()]
        if path and own and names.issuperset(own):
            found.append(path)
    return found


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
