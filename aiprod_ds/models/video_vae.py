"""What a video VAE must offer, and the one module that the engine trains.

Shape suffixes: B batch, C channels, T frames, H height, W width, L latent channels (time and space follow),
as in `video_BCTHW`. `VideoVAE` holds the model and runs encode, sample and decode in one forward, so that
everything the engine trains is reached through `engine(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.posterior import decoded_sample, draw_latent, split_posterior
from aiprod_ds.models.shapes import declared_number, on_meta
from aiprod_ds.models.vae import prepare_vae, require_vae

_PROBE_FRAMES, _PROBE_SIZE = 49, 128  # 48 and 128 are multiples of every published stride


class VideoVAE(nn.Module):
    """Wraps any video VAE for training.

    The model must offer `encode(video_BCTHW)`, which returns an object with `latent_dist` (diffusers), a
    `(mean, logvar)` pair or a plain latent tensor, and `decode(latent)`, which returns a tensor or an object
    with `sample`. Its hooks of weight normalisation are replaced (`compute_weights_in_forward`).
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = prepare_vae(vae)

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
        latent, mean, logvar = draw_latent(self.vae.encode(video_BCTHW), noise)
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
        spatial=config.spatial_stride or found.spatial, temporal=config.temporal_stride or found.temporal
    )


def _measure(vae: nn.Module) -> ModelStrides | None:
    shapes_only = on_meta(vae).eval()
    dtype = next((parameter.dtype for parameter in vae.parameters()), torch.float32)
    probe_BCTHW = torch.zeros(1, 3, _PROBE_FRAMES, _PROBE_SIZE, _PROBE_SIZE, device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            latent, _ = split_posterior(shapes_only.encode(probe_BCTHW))  # type: ignore[operator]
        frames, height = latent.shape[-3], latent.shape[-2]
        spatial, temporal = _PROBE_SIZE // height, (_PROBE_FRAMES - 1) // max(frames - 1, 1)
    except Exception:  # noqa: BLE001  a model that is no video VAE may fail in any way
        return None  # some models make tensors on the CPU inside forward, or encode tiles only
    return ModelStrides(spatial=spatial, temporal=temporal) if spatial and temporal else None


def _declared(vae: nn.Module) -> ModelStrides | None:
    spatial = declared_number(vae, "spatial_compression_ratio", "scale_factor_spatial")
    temporal = declared_number(vae, "temporal_compression_ratio", "scale_factor_temporal")
    return ModelStrides(spatial=spatial, temporal=temporal) if spatial and temporal else None
