"""The frozen VGG16 that `perceptual.py` looks through, and where its weights come from.

Owns the search for the weight file (configured path, torch hub cache, download), its check, and the
five-layer feature network. Does not know any loss.
"""

from __future__ import annotations

import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from aiprod_ds.errors import DataError
from aiprod_ds.files import file_sha256

LAYERS = {
    "relu1_2": 3,
    "relu2_2": 8,
    "relu3_3": 15,
    "relu4_3": 22,
    "relu5_3": 29,
}  # index in torchvision's `features`
MIN_SIZE = 16  # four poolings before relu5_3

WEIGHTS_URL: str = VGG16_Weights.IMAGENET1K_V1.url
WEIGHTS_NAME = Path(urlparse(WEIGHTS_URL).path).name
SHA256_PREFIX = WEIGHTS_NAME.removesuffix(".pth").rpartition("-")[2]
NETWORK_TIMEOUT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20


class WeightsUnavailableError(DataError):
    """No weight file was configured, none is in the torch hub cache, and the download failed."""


class VGGFeatures(nn.Module):
    """The convolutions of VGG16 in fp32, frozen and in evaluation mode for good.

    Args:
        weights_file: A torchvision VGG16 state dictionary, read with `weights_only`; None leaves all on the
            meta device.

    Raises:
        DataError: If the file is not such a dictionary.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights_file: Path | None) -> None:
        super().__init__()
        with torch.device("meta"):  # shapes only: the classifier's 123 million numbers are never allocated
            self.features = vgg16(weights=None).features
        if weights_file is not None:
            self.features.load_state_dict(
                _read_features(weights_file, list(self.features.state_dict())), assign=True
            )
        self.requires_grad_(False)
        device = "cpu" if weights_file is not None else "meta"
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1))
        self.train(False)

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """Returns the outputs of the five `LAYERS` for images [N,3,H,W] in [-1,1], H and W at least 16."""
        hidden = ((images_NCHW + 1) / 2 - self.mean) / self.std
        names = {index: name for name, index in LAYERS.items()}
        outputs: dict[str, Tensor] = {}
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in names:  # of a ReLU, which works in place; no layer after it does so on its output
                outputs[names[index]] = hidden
            if index == LAYERS["relu5_3"]:
                break
        return outputs

    def train(self, mode: bool = True) -> VGGFeatures:  # noqa: ARG002 (the signature is torch's)
        """Stays in evaluation mode."""
        super().train(False)
        return self


def locate_weights(configured: str | None, *, allow_unverified: bool = False) -> Path:
    """Returns the checked weight file: the configured one, else that of the torch hub cache, else downloads
    it there.

    A configured file is never replaced by another one. The download is atomic, so that several processes may
    race for it, and gives up after 10 seconds without an answer.

    Args:
        configured: `perceptual.weights` of the configuration; None looks into the cache.
        allow_unverified: Skips the hash check of a configured file, for weights of one's own.

    Raises:
        WeightsUnavailableError: If nothing is configured or cached and the download fails.
        DataError: If a file is missing or its SHA-256 is not that of torchvision's file.
    """
    found = _find(configured, allow_unverified=allow_unverified)
    if found is None:
        found = _cached()
        _download(found)
    return found


def local_weights(configured: str | None) -> Path:
    """Returns the checked weight file as `locate_weights` does, without a download.

    Raises:
        WeightsUnavailableError: If nothing is configured or cached.
        DataError: If a file is missing or its SHA-256 is not that of torchvision's file.
    """
    found = _find(configured, allow_unverified=False)
    if found is None:
        raise WeightsUnavailableError(
            f"needs VGG16 weights; not configured, not in {_cached().parent}. Set loss.perceptual.weights to "
            f"a local copy of {WEIGHTS_NAME}, or put that file into the torch hub cache."
        )
    return found


def _find(configured: str | None, *, allow_unverified: bool) -> Path | None:
    if configured is not None:
        path = Path(configured).expanduser()
        if not path.is_file():
            raise DataError(
                f"perceptual.weights: must be a file (torchvision's {WEIGHTS_NAME}), got "
                f"{configured!r}.{_WAYS_OUT}"
            )
        if not allow_unverified:
            _check_hash(path, _REPLACE)
        return path
    cached = _cached()
    if not cached.is_file():
        return None
    _check_hash(cached, "Delete it; it will be downloaded again.")
    return cached


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME


def _read_features(weights_file: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        state = torch.load(weights_file, map_location="cpu", weights_only=True)
        return {name: state[f"features.{name}"].float() for name in names}
    # torch.load raises anything from UnpicklingError to EOFError on a file that is something else
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{weights_file}: must be torchvision's VGG16 state dictionary, got {found}. {_REPLACE}"
        ) from error


def _check_hash(path: Path, fix: str) -> None:
    found = file_sha256(path)
    if not found.startswith(SHA256_PREFIX):
        raise DataError(
            f"{path}: SHA-256 must begin with {SHA256_PREFIX} (torchvision's {WEIGHTS_NAME}), "
            f"got {found[: len(SHA256_PREFIX)]}. {fix}"
        )


def _download(destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (
            urlopen(WEIGHTS_URL, timeout=NETWORK_TIMEOUT_SECONDS) as response,
            tempfile.NamedTemporaryFile(dir=destination.parent, suffix=".partial", delete=False) as file,
        ):
            _commit(response, file, destination)
    except (
        OSError,
        HTTPException,
        DataError,
    ) as error:  # DataError: another hash, such as the log-in page of a proxy
        raise WeightsUnavailableError(
            f"PerceptualLoss: needs VGG16 weights; not configured, not in {destination.parent}, "
            f"download failed ({error}).{_WAYS_OUT}"
        ) from error


def _commit(response: IO[bytes], file: IO[bytes], destination: Path) -> None:
    partial = Path(file.name)
    try:
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        _check_hash(partial, "The download was cut short or altered; try again.")
        file.close()
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


_REPLACE = "Download the file again, or remove perceptual.weights."
_WAYS_OUT = (
    f" Ways out: set perceptual.weights to a local copy of {WEIGHTS_NAME}; put that file into the torch hub "
    "cache"
    f" (TORCH_HOME/hub/checkpoints); or allow network access to {urlparse(WEIGHTS_URL).hostname}."
    " To train with mean squared error in its place, set perceptual.fallback: l2 (in Python, take "
    'PerceptualLoss(mode="l2")).'
)
