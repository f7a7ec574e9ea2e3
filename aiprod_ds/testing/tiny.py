"""Small things to train in tests, of this project and of its users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def tiny_ltx_vae(
    *,
    width: int = 8,
    latent_channels: int = 4,
    patch_size: int = 2,
    scaling: Sequence[bool] = (True, True, False),
) -> dict[str, Any]:
    """Returns settings of a small AutoencoderKLLTXVideo, JSON-ready; by default its strides are 8 in space
    and 4 in time.

    Args:
        width: Channels of every block.
        latent_channels: Channels of the latents.
        patch_size: Pixels that are folded into channels first, in both directions.
        scaling: Whether each block halves space and time.
    """
    blocks = len(scaling)
    return {
        "latent_channels": latent_channels,
        "block_out_channels": [width] * blocks,
        "decoder_block_out_channels": [width] * blocks,
        "layers_per_block": [1] * (blocks + 1),
        "decoder_layers_per_block": [1] * (blocks + 1),
        "spatio_temporal_scaling": list(scaling),
        "decoder_spatio_temporal_scaling": list(scaling),
        "patch_size": patch_size,
    }


def two_width_ltx_vae() -> dict[str, Any]:
    """Returns settings of an AutoencoderKLLTXVideo of two blocks with 8 and 16 channels and strides of 4 in
    space, 2 in time."""
    return {
        "latent_channels": 4,
        "patch_size": 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("LTXVideoDownBlock3D",) * 2,
        "layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, False),
        "decoder_block_out_channels": (8, 16),
        "decoder_layers_per_block": (1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, False),
        "decoder_inject_noise": (False,) * 3,
        "upsample_residual": (False, False),
        "upsample_factor": (1, 1),
    }


def tiny_cosmos() -> dict[str, Any]:
    """Returns settings of a small AutoencoderKLCosmos, JSON-ready, which has no posterior; its strides are 2
    in space and in time."""
    return {
        "encoder_block_out_channels": [8, 16],
        "decode_block_out_channels": [8, 16],
        "attention_resolutions": [4],
        "resolution": 16,
        "num_layers": 1,
        "patch_size": 2,
        "latent_channels": 4,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
    }


def tiny_allegro() -> dict[str, Any]:
    """Returns settings of a small AutoencoderKLAllegro, JSON-ready, which takes 2 k frames; its strides are 2
    in space and in time."""
    return {
        "block_out_channels": [8, 16],
        "down_block_types": ["AllegroDownBlock3D"] * 2,
        "up_block_types": ["AllegroUpBlock3D"] * 2,
        "temporal_downsample_blocks": [True, False],
        "temporal_upsample_blocks": [True, False],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "temporal_compression_ratio": 2,
        "latent_channels": 4,
    }


def tiny_oobleck(*, width: int = 8, latent_channels: int = 4) -> dict[str, Any]:
    """Returns settings of a small AutoencoderOobleck, JSON-ready, of which 8 samples become one latent.

    Args:
        width: Channels of encoder and decoder where they have fewest.
        latent_channels: Channels of the latents.
    """
    return {
        "encoder_hidden_size": width,
        "downsampling_ratios": [2, 4],
        "channel_multiples": [1, 2],
        "decoder_channels": width,
        "decoder_input_channels": latent_channels,
    }


class TinyVideoVAE(nn.Module):
    """A video VAE with strides 4 in space and 2 in time, a posterior (so that noise is drawn) and two
    repeated blocks.

    7,923 parameters. The blocks are what activation checkpointing recomputes.
    """

    spatial_stride = 4
    temporal_stride = 2

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(3, 8, 3, stride=(1, 2, 2), padding=1)
        self.blocks = nn.ModuleList([_Residual(8), _Residual(8)])
        self.moments = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.grow = nn.ConvTranspose3d(4, 8, 3, stride=2, padding=1, output_padding=(0, 1, 1))
        self.leave = nn.ConvTranspose3d(8, 3, (3, 4, 4), stride=(1, 2, 2), padding=1)

    def encode(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance, both [B, 4, (T + 1) / 2, H / 4, W / 4], of video [B, 3, T, H, W] in
        [-1, 1]."""
        hidden = self.enter(video_BCTHW)
        for block in self.blocks:
            hidden = block(hidden)
        mean, logvar = self.moments(hidden).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> Tensor:
        """Returns video [B, 3, T, H, W] for latents [B, 4, (T + 1) / 2, H / 4, W / 4]."""
        decoded: Tensor = self.leave(nn.functional.silu(self.grow(latent)))
        return decoded


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.mix = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.mix(nn.functional.silu(self.norm(hidden)))
        return hidden + mixed
