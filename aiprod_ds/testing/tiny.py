"""Small things to train in tests, of this project and of its users."""

from __future__ import annotations

from torch import Tensor, nn


class TinyVideoVAE(nn.Module):
    """A video VAE with strides 4 in space and 2 in time, a posterior (so that noise is drawn) and two repeated blocks.

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
        """Returns mean and log-variance, both [B, 4, (T + 1) / 2, H / 4, W / 4], of video [B, 3, T, H, W] in [-1, 1]."""
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
