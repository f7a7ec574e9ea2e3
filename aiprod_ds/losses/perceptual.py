"""Perceptual distance of video frames: how far apart VGG16 sees them.

Owns the two distances (`lpips`, `vgg`), the choice of frames and the explicit L2 fallback; the network is
`vgg.py`. Called by `video.py`, and by the evaluation for LPIPS. Shapes: B batch, C channels, T frames, H
height, W width, N images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from typing import Literal

import torch
from torch import Tensor, nn

from aiprod_ds.config.losses import PerceptualConfig
from aiprod_ds.errors import ConfigError, DataError
from aiprod_ds.losses.precision import no_autocast, widened
from aiprod_ds.losses.vgg import LAYERS, MIN_SIZE, VGGFeatures, WeightsUnavailableError, locate_weights

logger = logging.getLogger(__name__)

_NORM_EPSILON = 1e-8
_PIXELS_AT_ONCE = 2**20  # of measured frames: 256 MiB for the 64 channels of a layer in full resolution
_HEADS_PACKAGE = "torchmetrics.functional.image"
_HEADS_FILE = "lpips_models/vgg.pth"


class PerceptualLoss(nn.Module):
    """Distance between two videos in the features of a frozen VGG16, in fp32; or without a network.

        lpips:  P = sum_l mean_hw sum_c w_lc * (n(f_l(x)) - n(f_l(y)))_c^2
                n(f) = f * rsqrt(sum_c f_c^2 + 1e-8)
        vgg:    P = mean_l mean_chw (f_l(x) - f_l(y))^2
        l2:     P = mean (x - y)^2

    over the layers relu1_2, relu2_2, relu3_3, relu4_3, relu5_3; mean over frames and batch.

    The network is reachable but not registered: this module has no parameters and no state, so that no
    engine, optimizer, checkpoint, cast or `train()` can touch it, wherever the loss is put. It moves to the
    device of its input by itself.

    Args:
        config: Mode, weight file, fallback, frames per clip. None: the defaults, which need the weights of
            VGG16: a local file, the torch hub cache or a download.
        mode: In place of that in `config`; `l2` needs no weights. Not beside `config`.
        layers: For `vgg` mode, which layers; all five when None.
        is_blank: Has no weights and computes on the meta device only, for estimates of memory and time.
        allow_unverified_weights: Takes `config.weights` without the hash check, for weights of one's own.

    Raises:
        ConfigError: If `layers` names an unknown layer, or is given where it has no effect, as `mode` is
            beside `config`.
        DataError: If the weights cannot be had and `config.fallback` is `error`, or a given or cached file is
            damaged (a damaged file is an error under `l2` as well: only absence is replaced).

    Source: Zhang et al. 2018 (LPIPS 0.1, net `vgg`), linear heads from the file that torchmetrics ships;
    Johnson et al. 2016, equation 2 for `vgg`. Deviations: epsilon inside the root (`sqrt(sum f^2) + eps` has
    NaN gradients where all features are zero; torchmetrics agrees), dropout of the heads left out (it is
    inactive in evaluation), several layers in `vgg` mode.
    """

    def __init__(
        self,
        config: PerceptualConfig | None = None,
        *,
        mode: Literal["lpips", "vgg", "l2"] | None = None,
        layers: Sequence[str] | None = None,
        allow_unverified_weights: bool = False,
        is_blank: bool = False,
    ) -> None:
        super().__init__()
        if config is not None and mode is not None:
            raise ConfigError(
                f"PerceptualLoss: mode has no effect beside config, got {mode!r}. Set it in the config."
            )
        if config is None:
            config = PerceptualConfig() if mode is None else PerceptualConfig(mode=mode)
        self._frames_per_clip = config.frames_per_clip
        self._layers = _chosen_layers(config, layers)
        self._active_mode: Literal["lpips", "vgg", "l2"] = config.mode
        self._hidden: dict[
            str, VGGFeatures
        ] = {}  # a dict, because nn.Module would register the module itself
        self._heads = _lpips_heads() if config.mode == "lpips" else {}
        if config.mode == "l2":
            return
        if is_blank:
            self._hidden["network"] = VGGFeatures(None)
            return
        try:
            weights_file = locate_weights(config.weights, allow_unverified=allow_unverified_weights)
        except WeightsUnavailableError as error:
            if config.fallback == "error":
                raise
            self._active_mode = "l2"
            logger.warning("perceptual/mode=l2 reason=%s", error)
        else:
            self._hidden["network"] = VGGFeatures(weights_file)

    @property
    def active_mode(self) -> Literal["lpips", "vgg", "l2"]:
        """What is really computed: `l2` when the fallback took the place of the configured mode."""
        return self._active_mode

    @property
    def network(self) -> VGGFeatures | None:
        """The frozen network, None under the fallback."""
        return self._hidden.get("network")

    def forward(
        self, reconstruction_BCTHW: Tensor, target_BCTHW: Tensor, *, frame_seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the distance, 0-dim fp32 (fp64 for fp64 inputs under `l2`).

        Args:
            reconstruction_BCTHW: [B,3,T,H,W] in [-1,1], any float type, H and W at least 16 (any
                size under `l2`). Gradient flows to this one only.
            target_BCTHW: Same shape.
            frame_seeds: One seed per clip, to choose `frames_per_clip` frames; needed when that is above 0
                and below T. A seed made of the sample's global index keeps the choice independent of the
                world size.

        Raises:
            DataError: If the shapes differ or do not suit the network.
        """
        _check_videos(reconstruction_BCTHW, target_BCTHW, for_network=self._active_mode != "l2")
        with no_autocast(reconstruction_BCTHW):
            reconstruction, target = widened(reconstruction_BCTHW), widened(target_BCTHW)
            if self._active_mode == "l2":
                return (reconstruction - target.detach()).square().mean()
            frames = choose_frames(
                reconstruction.shape[0], reconstruction.shape[2], self._frames_per_clip, frame_seeds
            )
            # fp64 too becomes fp32, the type of the network.
            return self._feature_distance(
                _images(reconstruction, frames).float(), _images(target, frames).float()
            )

    @torch.no_grad()
    def measure(self, reconstruction_BCTHW: Tensor, target_BCTHW: Tensor) -> float:
        """Returns the distance over all frames, whatever `frames_per_clip` says, a few of them at a time.

        Args:
            reconstruction_BCTHW: As in `forward`.
            target_BCTHW: Same shape.

        Raises:
            DataError: As `forward`.
        """
        _check_videos(reconstruction_BCTHW, target_BCTHW, for_network=True)
        with no_autocast(reconstruction_BCTHW):
            sides = (_images(video, None).float() for video in (reconstruction_BCTHW, target_BCTHW))
            reconstruction_NCHW, target_NCHW = sides
            num_images, size = len(target_NCHW), target_NCHW[0, 0].numel()
            step, total = max(1, _PIXELS_AT_ONCE // size), 0.0
            for first in range(0, num_images, step):
                piece = slice(first, min(first + step, num_images))
                distance = self._feature_distance(reconstruction_NCHW[piece], target_NCHW[piece])
                total += float(distance) * (piece.stop - first)
        return total / num_images

    def _feature_distance(self, reconstruction_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
        network = self._hidden["network"].to(reconstruction_NCHW.device)
        # The target first: what its pass needs is free again before that of the reconstruction is kept.
        with torch.no_grad():
            targets = network(target_NCHW)
        outputs = network(reconstruction_NCHW)
        if self._active_mode == "vgg":
            return torch.stack(
                [(outputs[name] - targets[name]).square().mean() for name in self._layers]
            ).mean()
        heads = {name: head.to(reconstruction_NCHW.device) for name, head in self._heads.items()}
        return torch.stack(
            [_lpips_layer(outputs[name], targets[name], heads[name]) for name in self._layers]
        ).sum()


def choose_frames(
    num_clips: int, num_frames: int, frames_per_clip: int, seeds: Sequence[int] | None
) -> Tensor | None:
    """Returns the frame indices to look at, [B,k] int64 ascending without repeats; None for all of them (k 0
    or not below T)."""
    if frames_per_clip == 0 or frames_per_clip >= num_frames:
        return None
    if seeds is None or len(seeds) != num_clips:
        raise DataError(
            f"perceptual.frames_per_clip: choosing {frames_per_clip} of {num_frames} frames needs "
            f"{num_clips} seeds, "
            f"got {None if seeds is None else len(seeds)}. Pass one of frame_seeds per clip, or set "
            "frames_per_clip to 0."
        )
    draws = [torch.randperm(num_frames, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack([draw[:frames_per_clip].sort().values for draw in draws])


def _images(video_BCTHW: Tensor, frames: Tensor | None) -> Tensor:
    video_BTCHW = video_BCTHW.transpose(1, 2)
    if frames is not None:
        rows = torch.arange(len(frames), device=video_BCTHW.device).unsqueeze(1)
        video_BTCHW = video_BTCHW[rows, frames.to(video_BCTHW.device)]
    return video_BTCHW.flatten(0, 1)


def _lpips_layer(output_NCHW: Tensor, target_NCHW: Tensor, head_C: Tensor) -> Tensor:
    difference = _unit_channels(output_NCHW) - _unit_channels(target_NCHW)
    return (difference.square() * head_C.view(1, -1, 1, 1)).sum(dim=1).mean()


def _unit_channels(features_NCHW: Tensor) -> Tensor:
    return features_NCHW * torch.rsqrt(features_NCHW.square().sum(dim=1, keepdim=True) + _NORM_EPSILON)


def _lpips_heads() -> Mapping[str, Tensor]:
    resource = files(_HEADS_PACKAGE).joinpath(_HEADS_FILE)
    if not resource.is_file():
        raise DataError(
            f"PerceptualLoss: the LPIPS heads must be in {resource}, got no such file. Reinstall "
            "torchmetrics."
        )
    with as_file(resource) as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: state[f"lin{index}.model.1.weight"].flatten().float() for index, name in enumerate(LAYERS)}


def _chosen_layers(config: PerceptualConfig, layers: Sequence[str] | None) -> tuple[str, ...]:
    if layers is None:
        return tuple(LAYERS)
    if config.mode != "vgg":
        raise ConfigError(
            f"PerceptualLoss: layers has no effect in {config.mode} mode: the heads of lpips take all five, "
            "l2 has none. Remove it or use vgg."
        )
    if not layers or set(layers) - set(LAYERS):
        raise ConfigError(f"PerceptualLoss: layers must be some of {', '.join(LAYERS)}, got {list(layers)}.")
    return tuple(layers)


def _check_videos(reconstruction: Tensor, target: Tensor, *, for_network: bool) -> None:
    shape = tuple(reconstruction.shape)
    if shape != tuple(target.shape):
        raise DataError(
            f"PerceptualLoss: both videos must have one shape, got {list(shape)} and {list(target.shape)}."
        )
    if for_network and (len(shape) != 5 or shape[1] != 3 or min(shape[3:]) < MIN_SIZE):
        raise DataError(
            f"PerceptualLoss: videos must be [B,3,T,H,W] with H and W at least {MIN_SIZE}, got "
            f"{list(shape)}. "
            "Raise the resolution, or set perceptual_weight to 0."
        )
