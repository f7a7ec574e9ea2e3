"""Patch discriminators of video: one of space and time, one of single frames.

Shape suffixes: B batch, C channels, T frames, H height, W width, as in `video_BCTHW`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiprod_ds.config.losses import PatchDiscriminatorConfig

_SLOPE = 0.2
_MOST_TIMES = 8  # the widest layer has so many times the channels of the first
_GROUP_CHANNELS = 16


class VideoPatchDiscriminator(nn.Module):
    """Judges patches of space and time: a PatchGAN with kernels of 3 frames.

    The first of its `layers` halves height and width, the others halve the frames too (rounded up, so that
    one frame stays one); then come a layer and a head that keep the shape. A logit of the default three
    layers sees 54 x 54 pixels of 25 frames.

    Args:
        config: Channels and layers.

    Source: the PatchGAN of Isola et al. 2017 (pix2pix, appendix 6.1.2), over time as in TATS (Ge et al.
    2022) and VidTok (Tang et al. 2024). Deviations: group norm in place of batch norm, whose statistics
    would depend on how a batch is cut over ranks; the last two kernels are 3, so that small clips have a
    logit.
    """

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.body, self.head = _layers(config, dims=3)

    def forward(self, video_BCTHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits [B, 1, t, h, w], and what each layer gave."""
        return _run(self.body, self.head, video_BCTHW)


class FrameDiscriminator(nn.Module):
    """Judges patches of every frame by itself: the PatchGAN of images.

    Args:
        config: Channels and layers.

    Source: Isola et al. 2017; Esser et al. 2021 (VQGAN), whose deviations from it, and ours, are those of
    `VideoPatchDiscriminator`.
    """

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.body, self.head = _layers(config, dims=2)

    def forward(self, video_BCTHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits [B, T, h, w], and what each layer gave, [B, T * channels, h, w]."""
        batch = len(video_BCTHW)
        logits, features = _run(self.body, self.head, video_BCTHW.transpose(1, 2).flatten(0, 1))
        clips = [torch.unflatten(feature, 0, (batch, -1)).flatten(1, 2) for feature in (logits, *features)]
        return clips[0], clips[1:]


def smallest_side(config: PatchDiscriminatorConfig) -> int:
    """Returns the least height and width of a frame that has a logit."""
    return 1 << config.layers


def _layers(config: PatchDiscriminatorConfig, *, dims: int) -> tuple[nn.ModuleList, nn.Module]:
    body = nn.ModuleList()
    channels = 3
    for index in range(config.layers + 1):
        width = config.channels * min(2**index, _MOST_TIMES)
        halves, is_first = index < config.layers, index == 0
        conv = _conv(channels, width, dims=dims, halves=halves, halves_time=halves and not is_first)
        # The first layer sees the pixels as they are; after it a layer's scale is taken out.
        norm = nn.Identity() if is_first else nn.GroupNorm(max(1, width // _GROUP_CHANNELS), width)
        body.append(nn.Sequential(conv, norm))
        channels = width
    return body, _conv(channels, 1, dims=dims, halves=False, halves_time=False)


def _conv(channels: int, width: int, *, dims: int, halves: bool, halves_time: bool) -> nn.Module:
    kernel, stride = (4, 2) if halves else (3, 1)
    if dims == 2:
        return nn.Conv2d(channels, width, kernel, stride=stride, padding=1)
    strides = (2 if halves_time else 1, stride, stride)
    return nn.Conv3d(channels, width, (3, kernel, kernel), stride=strides, padding=1)


def _run(body: nn.ModuleList, head: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    hidden, features = pixels.to(next(head.parameters()).dtype), []
    for layer in body:
        hidden = F.leaky_relu(layer(hidden), _SLOPE)
        features.append(hidden)
    return head(hidden), features
