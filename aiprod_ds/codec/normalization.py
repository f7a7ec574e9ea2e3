"""Latents of mean 0 and standard deviation 1, as diffusion models are trained on them, and back to what the
VAE decodes.

Owns where the statistics come from. Encoding normalises, previews undo it. Shapes: B batch, C channels, T
time, M mel bands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import DataError
from aiprod_ds.files import read_text

_STATISTICS_FILE = "latent_statistics.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentNormalization:
    """One mean and deviation for all channels, each channel, or each channel of each mel band; empty ones
    change nothing.

        normalised = (latent - mean) / std

    Worked number: mean 0.5 and std 2 make 4.5 a 2.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def normalize(self, latent_BC: Tensor) -> Tensor:
        """Returns the normalised latents, fp32, of [B, C, ...].

        Raises:
            DataError: If the statistics are of another number of channels.
        """
        if not self.mean:
            return latent_BC.float()
        mean, std = self._fitting(latent_BC)
        return (latent_BC.float() - mean) / std

    def denormalize(self, latent_BC: Tensor) -> Tensor:
        """Returns what the VAE decodes, fp32, of normalised latents [B, C, ...].

        Raises:
            DataError: If the statistics are of another number of channels.
        """
        if not self.mean:
            return latent_BC.float()
        mean, std = self._fitting(latent_BC)
        return latent_BC.float() * std + mean

    def _fitting(self, latent_BC: Tensor) -> tuple[Tensor, Tensor]:
        channels, length = latent_BC.shape[1], len(self.mean)
        if length in (1, channels):
            shape = [1, length] + [1] * (latent_BC.ndim - 2)
        elif latent_BC.ndim == 4 and length == channels * latent_BC.shape[3]:
            shape = [
                1,
                channels,
                1,
                latent_BC.shape[3],
            ]  # LTX-2's sounds [B,C,T,M]: channel by channel, band by band
        else:
            raise DataError(
                f"latent statistics: must have {channels} channels as the latents have, got {length}."
            )
        mean, std = (
            torch.tensor(values, device=latent_BC.device).reshape(shape) for values in (self.mean, self.std)
        )
        return mean, std


def normalization_of(vae: nn.Module, config: ModelConfig) -> LatentNormalization:
    """Returns the statistics by which latents of `vae` are normalised.

    The first of these: `latents_mean` and `latents_std` in the model's buffers or configuration, unless they
    are 0 and 1, which is what diffusers puts there for a model without them; `latent_statistics.json` beside
    the weights, which the export of a VAE writes; none. A `scaling_factor` in the configuration divides the
    deviation, as in diffusers' pipelines.

    Raises:
        DataError: If the file is malformed.
    """
    mean, std = _own(vae) or _exported(config) or ([], [])
    scale = _declared(vae, "scaling_factor")
    if isinstance(scale, (int, float)) and scale != 1.0:
        mean, std = mean or [0.0], std or [1.0]
        std = [value / scale for value in std]
    return LatentNormalization(mean=tuple(mean), std=tuple(std))


def _own(vae: nn.Module) -> tuple[list[float], list[float]] | None:
    mean, std = _declared(vae, "latents_mean"), _declared(vae, "latents_std")
    if mean is None or std is None:
        return None
    means, stds = (torch.as_tensor(values, dtype=torch.float32).flatten().tolist() for values in (mean, std))
    is_default = all(value == 0 for value in means) and all(value == 1 for value in stds)
    return None if is_default else (means, stds)


def _declared(vae: nn.Module, name: str) -> Any:
    buffer = dict(vae.named_buffers(recurse=False)).get(name)
    config: Any = getattr(vae, "config", {})
    return buffer if buffer is not None else config.get(name) if hasattr(config, "get") else None


def _exported(config: ModelConfig) -> tuple[list[float], list[float]] | None:
    path = Path(config.pretrained or "") / (config.subfolder or "") / _STATISTICS_FILE
    if config.pretrained is None or not path.exists():
        return None
    try:
        document = json.loads(read_text(path))
        mean, std = ([float(value) for value in document[name]] for name in ("latents_mean", "latents_std"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise DataError(
            f"{path}: must hold latents_mean and latents_std, got: {error!r}. Export the VAE again."
        ) from error
    if len(mean) != len(std) or any(value <= 0 for value in std):
        raise DataError(
            f"{path}: latents_std must be positive, one for each latents_mean, got {std[:5]}. Export the "
            "VAE again."
        )
    return (mean, std) if mean else None
