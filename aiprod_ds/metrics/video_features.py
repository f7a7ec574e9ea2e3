"""The network that turns clips into features for rFVD: I3D from a TorchScript file, or any other that a
configuration names.

Owns where the network comes from, what its input is made to look like, and the trial with which a network
that does not fit is found before training. Called by `frechet.py`, and by the trainers for the check. Shapes:
B batch, C channels, T frames, H height, W width, F features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aiprod_ds.config.video_vae import FvdConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import file_sha256
from aiprod_ds.import_path import import_factory

_KEY = "evaluation.measures.fvd"
# The arguments of the TorchScript I3D that is in common use: features in place of probabilities, of frames
# that have the right size and range already.
_I3D_ARGUMENTS = {"rescale": False, "resize": False, "return_features": True}
# Of the file that StyleGAN-V and what follows it load from the address in their code.
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
_HUB_PARTS = 3


class VideoFeatures:
    """Features of clips, from a frozen network in fp32.

    Frames are scaled (bilinear) until their shorter side is `size`, and cut out in the middle. All frames of
    a clip are shown.

    Args:
        network: Makes [B,F] of videos [B,3,T,size,size] in [-1,1].
        size: Height and width of its frames.
        num_frames: Of the clips to come; one such clip is tried out.
        where: What it is called in messages.

    Raises:
        ConfigError: If the network does not take such clips, or what it makes is not [B,F].

    Source of the preparation: `preprocess_single` of VideoGPT's and StyleGAN-V's FVD, as
    github.com/JunyaoHu/common_metrics_on_video_quality has it.
    """

    def __init__(self, network: Callable[..., Any], *, size: int, num_frames: int, where: str) -> None:
        if isinstance(network, nn.Module):
            network.eval()
            for parameter in network.parameters():
                parameter.requires_grad_(False)
        self._network = network
        self._size = size
        self._arguments = _I3D_ARGUMENTS if _takes_i3d_arguments(network) else {}
        self.num_features = self._tried_out(num_frames, where)

    @torch.no_grad()
    def __call__(self, video_BCTHW: Tensor) -> Tensor:
        """Returns the features, [B,F] float64 on the CPU, of videos in [-1,1] of any size."""
        network = self._network
        if isinstance(network, nn.Module):
            network = network.to(video_BCTHW.device)
        features_BF: Tensor = network(prepared(video_BCTHW.float(), self._size), **self._arguments)
        return features_BF.double().cpu()

    def _tried_out(self, num_frames: int, where: str) -> int:
        size = self._size
        shape = f"[1,3,{num_frames},{size},{size}]"
        try:
            features = self(torch.zeros(1, 3, num_frames, size, size))
        except Exception as error:
            told = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ConfigError(
                f"{_KEY}.network: must make features of a clip {shape}, the shape of the last phase, got "
                f"{where!r} with {told[0]}. Lengthen the clips, set {_KEY}.size or name another network."
            ) from error
        if features.dim() != 2 or len(features) != 1:
            raise ConfigError(
                f"{_KEY}.network: must make features [1,F] of a clip {shape}, got {list(features.shape)} "
                f"from {where!r}. Name another network."
            )
        return features.shape[1]


def prepared(video_BCTHW: Tensor, size: int) -> Tensor:
    """Returns the middle of the frames, [B,3,T,size,size], whose shorter side was scaled to `size`."""
    batch, channels, frames, height, width = video_BCTHW.shape
    shorter = min(height, width)
    target = [size if side == shorter else math.ceil(side * (size / shorter)) for side in (height, width)]
    images_NCHW = video_BCTHW.transpose(1, 2).flatten(0, 1)
    if target != [height, width]:
        images_NCHW = F.interpolate(images_NCHW, size=target, mode="bilinear", align_corners=False)
    top, left = ((side - size) // 2 for side in target)
    images_NCHW = images_NCHW[:, :, top : top + size, left : left + size]
    return images_NCHW.reshape(batch, frames, channels, size, size).transpose(1, 2).contiguous()


def load_features(config: FvdConfig, *, num_frames: int) -> VideoFeatures:
    """Returns the network that `config` names, tried out on a blank clip of `num_frames` frames.

    What an import path makes draws from random streams of its own, so that it is the same on all ranks and
    training draws what it would have drawn.

    Raises:
        ConfigError: If there is no such file or function, its hash is another, or it makes no features of
            such clips.
    """
    source = config.network
    if ":" in source:
        factory = import_factory(source, key=f"{_KEY}.network")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                network = factory()
            except Exception as error:  # it is a user's own, and may fail in any way
                raise ConfigError(
                    f"{_KEY}.network: must make a network without arguments, got {source!r}, which fails "
                    f"({type(error).__name__}: {error}). Correct it."
                ) from error
        if not callable(network):
            raise ConfigError(
                f"{_KEY}.network: must make a network, got {type(network).__name__} from {source!r}. Name a "
                "function without arguments that returns one."
            )
    else:
        network = _read_torchscript(_find_file(source), source, config.sha256)
    return VideoFeatures(network, size=config.size, num_frames=num_frames, where=source)


def _find_file(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    parts = source.split("/")
    if len(parts) == _HUB_PARTS and all(parts) and not path.is_absolute():
        return _from_hub("/".join(parts[:2]), parts[2], source)
    raise ConfigError(f"{_KEY}.network: must be a file, got {source!r}, which is none.{_WAYS_OUT}")


def _from_hub(repository: str, name: str, source: str) -> Path:
    from huggingface_hub import hf_hub_download  # takes a second to import; needed only here

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:  # all that the hub raises is one of the two
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ConfigError(
            f"{_KEY}.network: must be a file or one of a hub repository, got {source!r} ({told[0]})."
            f"{_WAYS_OUT}"
        ) from error


def _read_torchscript(path: Path, source: str, sha256: str | None) -> nn.Module:
    # torch warns that a file made for it may run code when it is read: only known ones are.
    found, wanted = file_sha256(path), sha256 or I3D_SHA256
    if found != wanted:
        raise ConfigError(
            f"{_KEY}.network: must be a file with the SHA-256 {wanted}, got {source!r} with {found}. "
            f"Download it again; if you trust this file, set {_KEY}.sha256 to what it has."
        )
    try:
        with warnings.catch_warnings():
            # The I3D of published figures exists in this form only.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=FutureWarning)
            network: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ConfigError(
            f"{_KEY}.network: must be a TorchScript file, got {source!r} ({told[0]}).{_WAYS_OUT}"
        ) from error
    return network


def _takes_i3d_arguments(network: Callable[..., Any]) -> bool:
    if not isinstance(network, torch.jit.ScriptModule):
        return False
    forward: Any = network.forward
    names = {argument.name for argument in forward.schema.arguments}
    return set(_I3D_ARGUMENTS) <= names


_WAYS_OUT = (
    " Ways out: name a local copy of i3d_torchscript.pt; name one of a hub repository (owner/name/file.pt) "
    "and allow network access, or download it before; name a network of your own (module:function); or "
    f"remove {_KEY}."
)
