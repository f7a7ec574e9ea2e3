"""How close reconstructed clips are to their originals: PSNR, SSIM, flicker and, with a network, LPIPS.

Owns the measures of one clip; measured, never trained. Called by evaluation. Shapes: B batch, T frames, H
height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.quality_sums import QualitySums

PSNR_CEILING_DB = 100.0  # an exact copy has infinite PSNR, which no mean survives
_SSIM_WINDOW = 11
_SSIM_FRAMES = 8
_FIELDS = ("clips", "psnr_db", "ssim", "original_change", "reconstruction_change", "lpips_vgg")


class VideoQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its size.

    Values are mapped from [-1,1] to [0,1] and the reconstruction is clipped to it, as saving a picture would.
    Per clip:

        psnr_db = min(10 * log10(1 / mean (x - y)^2), 100)   peak 1.0; the mean over clips of per-clip PSNR
        ssim    = mean over frames of SSIM (11x11 Gaussian window, sigma 1.5, mirrored borders, range 1.0)
        flicker_ratio = sum over clips of mean|y_t+1 - y_t| / sum over clips of mean|x_t+1 - x_t|
                        (1.0: motion as filmed)

    Worked number: a reconstruction 0.2 too bright everywhere in [-1,1] is 0.1 off in [0,1]: 20 dB, flicker
    ratio 1.

    Args:
        lpips: Distance of two videos [1,3,T,H,W] in [-1,1], averaged over frames (the LPIPS mode of the
            perceptual loss); None leaves the metric out.
    """

    def __init__(self, lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__("video", _FIELDS)
        self._lpips = lpips

    @torch.no_grad()
    def update(self, original_BCTHW: Tensor, reconstruction_BCTHW: Tensor) -> None:
        """Adds a batch of clips; computes on the device they are on.

        Args:
            original_BCTHW: [B,3,T,H,W] in [-1,1], any float type, H and W at least 11.
            reconstruction_BCTHW: Same shape.

        Raises:
            DataError: If the shapes differ or are too small for SSIM.
        """
        _check_shapes(original_BCTHW, reconstruction_BCTHW)
        for original_CTHW, reconstruction_CTHW in zip(original_BCTHW, reconstruction_BCTHW, strict=True):
            self._add(self._clip(original_CTHW.float(), reconstruction_CTHW.float()))

    def compute(self) -> dict[str, float]:
        """Returns `psnr_db`, `ssim`, and where defined `flicker_ratio` (some original moves) and `lpips_vgg`
        (network given).

        Raises:
            DataError: If no clip was added.
        """
        sums = self._totals()
        result = {"psnr_db": sums["psnr_db"] / sums["clips"], "ssim": sums["ssim"] / sums["clips"]}
        if sums["original_change"] > 0:
            result["flicker_ratio"] = sums["reconstruction_change"] / sums["original_change"]
        if self._lpips is not None:
            result["lpips_vgg"] = sums["lpips_vgg"] / sums["clips"]
        return result

    def _clip(self, original_CTHW: Tensor, reconstruction_CTHW: Tensor) -> list[float]:
        x_TCHW, y_TCHW = (
            ((video + 1) / 2).clamp(0, 1).transpose(0, 1) for video in (original_CTHW, reconstruction_CTHW)
        )
        lpips = 0.0
        if self._lpips is not None:
            lpips = float(
                self._lpips(reconstruction_CTHW.clamp(-1, 1).unsqueeze(0), original_CTHW.unsqueeze(0))
            )
        return [1.0, _psnr_db(x_TCHW, y_TCHW), _ssim(x_TCHW, y_TCHW), _change(x_TCHW), _change(y_TCHW), lpips]


def _psnr_db(x_TCHW: Tensor, y_TCHW: Tensor) -> float:
    # loads all of torchmetrics, which takes over a second
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return min(float(peak_signal_noise_ratio(y_TCHW, x_TCHW, data_range=1.0)), PSNR_CEILING_DB)


def _ssim(x_TCHW: Tensor, y_TCHW: Tensor) -> float:
    """In pieces of some frames, because torchmetrics filters five stacked copies of its input at once."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    total = 0.0
    for first in range(0, len(x_TCHW), _SSIM_FRAMES):
        x, y = x_TCHW[first : first + _SSIM_FRAMES], y_TCHW[first : first + _SSIM_FRAMES]
        piece = structural_similarity_index_measure(y, x, data_range=1.0)
        assert isinstance(piece, Tensor), (
            "a pair comes only with return_full_image or return_contrast_sensitivity"
        )
        total += float(piece) * len(x)
    return total / len(x_TCHW)


def _change(video_TCHW: Tensor) -> float:
    return float(video_TCHW.diff(dim=0).abs().mean()) if len(video_TCHW) > 1 else 0.0


def _check_shapes(original: Tensor, reconstruction: Tensor) -> None:
    shape = list(original.shape)
    if shape != list(reconstruction.shape):
        raise DataError(
            f"video quality: both videos must have one shape, got {shape} and {list(reconstruction.shape)}."
        )
    if len(shape) != 5 or min(shape[3:]) < _SSIM_WINDOW:
        raise DataError(
            f"video quality: videos must be [B,3,T,H,W] with H and W at least {_SSIM_WINDOW} (SSIM's "
            f"window), got {shape}."
        )
