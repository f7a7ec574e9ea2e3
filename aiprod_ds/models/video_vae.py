"""What a video VAE must offer, and the one module that the engine trains.

Shape suffixes: B batch, C channels, T frames, H height, W width, L latent channels (time and space follow),
as in `video_BCTHW`. `VideoVAE` holds the model and runs encode, sample and decode in one forward, so that
everything the engine trains is reached through `engine(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.clips import take_clips
from aiprod_ds.models.posterior import decoded_sample, draw_latent, split_posterior
from aiprod_ds.models.shapes import declared_number, on_meta
from aiprod_ds.models.vae import WrappedVAE, require_vae

_PROBE_FRAMES, _PROBE_SIZE = 48, 128  # multiples of every published stride


class VideoVAE(WrappedVAE):
    """Wraps any video VAE for training.

    The model must offer `encode(video_BCTHW)`, which returns an object with `latent_dist` or `latent`
    (diffusers), a `(mean, logvar)` pair or a plain latent tensor, and `decode(latent)`, which returns a
    tensor or an object with `sample`. Models of pictures, and Allegro's, are made to (`take_clips`).
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__(vae)
        take_clips(vae)

    def forward(
        self, video_BCTHW: Tensor, noise: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encodes, draws a latent and decodes.

        Args:
            video_BCTHW: [B, 3, T, H, W] in [-1, 1], in the module's dtype.
            noise: See `draw_latent`; None, as in evaluation, takes the posterior's mode.

        Returns:
            (reconstruction_BCTHW, mean, logvar), the last two fp32; logvar is None for a deterministic
            autoencoder.

        Raises:
            EngineError: If the model returns another shape than it was given.
        """
        latent, mean, logvar = draw_latent(self.encoded(video_BCTHW), noise)
        reconstruction = decoded_sample(self.vae.decode(latent.to(video_BCTHW.dtype)))
        if reconstruction.shape != video_BCTHW.shape:
            raise EngineError(
                f"model: the reconstruction must have the input's shape {tuple(video_BCTHW.shape)}, "
                f"got {tuple(reconstruction.shape)}. "
                "Set model.spatial_stride and model.temporal_stride to the model's own."
            )
        return reconstruction, mean, logvar


def video_strides(vae: nn.Module, config: ModelConfig) -> ModelStrides:
    """Returns the strides: those of the configuration, else measured by encoding shapes, else as the model
    declares them.

    Measuring comes before the model's word because diffusers 0.42.1 declares 64 and 16 for
    AutoencoderKLLTX2Video, whose encoder has 32 and 8. It runs on the meta device and costs no memory.

    Raises:
        ConfigError: If the model is no VAE, or a stride is neither given nor to be found.
    """
    require_vae(vae)
    if config.spatial_stride and config.temporal_stride:
        return ModelStrides(spatial=config.spatial_stride, temporal=config.temporal_stride)
    found = _measure(vae) or _declared(vae)
    if found is None:
        raise ConfigError(
            f"model: the strides of {type(vae).__name__} are neither declared nor measurable. "
            "Set model.spatial_stride and model.temporal_stride."
        )
    return ModelStrides(
        spatial=config.spatial_stride or found.spatial,
        temporal=config.temporal_stride or found.temporal,
        is_causal=found.is_causal,
    )


def _measure(vae: nn.Module) -> ModelStrides | None:
    shapes_only = on_meta(vae).eval()
    take_clips(shapes_only)
    dtype = next((parameter.dtype for parameter in vae.parameters()), torch.float32)
    return _measured(shapes_only, dtype, is_causal=True) or _measured(shapes_only, dtype, is_causal=False)


def _measured(shapes_only: Any, dtype: torch.dtype, *, is_causal: bool) -> ModelStrides | None:
    """Returns the strides by a clip of 49 frames, or of 48 where the model makes whole groups of them."""
    first = 1 if is_causal else 0
    size = (1, 3, first + _PROBE_FRAMES, _PROBE_SIZE, _PROBE_SIZE)
    try:
        with torch.no_grad():
            latent, _ = split_posterior(shapes_only.encode(torch.zeros(size, device="meta", dtype=dtype)))
        frames, height = latent.shape[-3], latent.shape[-2]
        spatial, temporal = _PROBE_SIZE // height, _PROBE_FRAMES // max(frames - first, 1)
    except Exception:  # noqa: BLE001  a model that is no video VAE may fail in any way
        return None  # some models make tensors on the CPU inside forward
    if not (spatial and temporal):
        return None
    return ModelStrides(spatial=spatial, temporal=temporal, is_causal=is_causal)


def _declared(vae: nn.Module) -> ModelStrides | None:
    spatial = declared_number(vae, "spatial_compression_ratio", "scale_factor_spatial")
    temporal = declared_number(vae, "temporal_compression_ratio", "scale_factor_temporal")
    return ModelStrides(spatial=spatial, temporal=temporal) if spatial and temporal else None
