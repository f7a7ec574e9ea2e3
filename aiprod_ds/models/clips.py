"""Video clips, whole, for models that take something else: single pictures, or tiles of one size.

Owns what is put in place of a model's own `encode` and `decode`; its weights, configuration and files stay as
they are. Called by `VideoVAE` and where strides are measured. Shapes: B batch, C channels, T frames, H
height, W width, L latent channels (frames, height and width follow).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.models.posterior import decoded_sample, split_posterior
from aiprod_ds.models.shapes import on_meta

_PROBE = (1, 3, 1, 64, 64)  # a clip of one frame
_TILES_ONLY = "AutoencoderKLAllegro"


def take_clips(vae: nn.Module) -> None:
    """Makes `vae.encode` take [B,3,T,H,W] and `vae.decode` give it back, in place, where its class takes
    other things.

    - A model of pictures (diffusers' AutoencoderKL, AutoencoderDC, AutoencoderTiny) gets every frame as a
      picture: one without a convolution in 3-D that takes [B,3,H,W] and not [B,3,T,H,W].
    - AutoencoderKLAllegro of diffusers encodes and decodes tiles of one size alone, a clip at a time; it gets
      every clip as its one tile, of whatever size, and all clips of a batch at once.

    Any other model stays as it is.
    """
    if any(name in vars(vae) for name in ("encode", "_encode")):
        return
    replaced: Any = vae
    if type(vae).__name__ == _TILES_ONLY and not getattr(vae, "use_tiling", True):
        replaced._encode = MethodType(_encode_one_tile, vae)
        replaced._decode = MethodType(_decode_one_tile, vae)
    elif _takes_pictures(vae):
        replaced.encode = MethodType(_encode_frames, vae)
        replaced.decode = MethodType(_decode_frames, vae)


def _encode_one_tile(vae: Any, video_BCTHW: Tensor) -> Tensor:
    # diffusers 0.42.1, autoencoder_kl_allegro.py, tiled_encode with one tile and without its loop over clips.
    return _each_frame(vae.quant_conv, vae.encoder(video_BCTHW))


def _decode_one_tile(vae: Any, latent: Tensor) -> Tensor:
    # Likewise tiled_decode, which then hands out [B,T,C,H,W]: `permute(0, 2, 1, 3, 4)` at its end.
    decoded: Tensor = vae.decoder(_each_frame(vae.post_quant_conv, latent))
    return decoded


def _encode_frames(vae: Any, video_BCTHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    mean, logvar = split_posterior(type(vae).encode(vae, video_BCTHW.transpose(1, 2).flatten(0, 1)))
    clips = len(video_BCTHW)
    if logvar is None:
        return _clips_of(mean, clips)
    return _clips_of(mean, clips), _clips_of(logvar, clips)


def _decode_frames(vae: Any, latent: Tensor) -> Tensor:
    decoded = decoded_sample(type(vae).decode(vae, latent.transpose(1, 2).flatten(0, 1)))
    return _clips_of(decoded, len(latent))


def _each_frame(layer: nn.Module, hidden: Tensor) -> Tensor:
    return _clips_of(layer(hidden.transpose(1, 2).flatten(0, 1)), len(hidden))


def _clips_of(frames: Tensor, num_clips: int) -> Tensor:
    return torch.unflatten(frames, 0, (num_clips, -1)).transpose(1, 2)


def _takes_pictures(vae: nn.Module) -> bool:
    kinds = {type(part) for part in vae.modules()}
    if any(issubclass(kind, nn.Conv3d) for kind in kinds):
        return False
    if not any(issubclass(kind, nn.Conv2d) for kind in kinds):
        return False
    blank: Any = on_meta(vae).eval()
    dtype = next(vae.parameters()).dtype
    clip_BCTHW = torch.zeros(_PROBE, device="meta", dtype=dtype)
    return not _encodes(blank, clip_BCTHW) and _encodes(blank, clip_BCTHW[:, :, 0])


def _encodes(blank: Any, given: Tensor) -> bool:
    try:
        with torch.no_grad():
            blank.encode(given)
    except Exception:  # noqa: BLE001  what a model does with a shape that it is not made for is its own affair
        return False
    return True
