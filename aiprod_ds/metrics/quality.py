"""How close reconstructed clips are to their originals: PSNR, SSIM, flicker and, with a network, LPIPS and
rFVD.

Owns the measures of one clip; measured, never trained. Called by evaluation. Shapes: B batch, T frames, H
height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aiprod_ds.errors import DataError
from aiprod_ds.metrics.frechet import FrechetDistance
from aiprod_ds.metrics.quality_sums import Finding, QualitySums, clip_names, nan_where_not_finite
from aiprod_ds.metrics.video_features import VideoFeatures

PSNR_CEILING_DB = 100.0  # an exact copy has infinite PSNR, which no mean survives
_SSIM_WINDOW = 11
_SSIM_FRAMES = 8
_CHANGES = ("original_change", "reconstruction_change")


class VideoQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its size.

    Values are mapped from [-1,1] to [0,1] and the reconstruction is clipped to it, as saving a picture would;
    what is not finite becomes NaN before. Per clip:

        psnr_db = min(10 * log10(1 / mean (x - y)^2), 100)   peak 1.0; the mean over clips of per-clip PSNR
        ssim    = mean over frames of SSIM (11x11 Gaussian window, sigma 1.5, mirrored borders, range 1.0)
        flicker_error = mean|(y_t+1 - y_t) - (x_t+1 - x_t)|                  (0: as filmed)
        flicker_ratio = sum over clips of mean|y_t+1 - y_t| / sum over clips of mean|x_t+1 - x_t|
                        (1.0: as much motion as filmed)

    A ratio near 1 may hide flicker in place of lost motion; the error does not. A clip of one frame has
    neither, one that does not move has no ratio, one smaller than the window no SSIM: they are not judged.

    Worked number: a reconstruction 0.2 too bright everywhere in [-1,1] is 0.1 off in [0,1]: 20 dB, flicker
    error 0, flicker ratio 1. With every second frame 0.2 too bright, flicker error 0.1.

    Source of the flicker error: Erofeev et al. 2015, dtSSD (temporal differences of a result against those of
    the truth). Deviation: mean absolute instead of root mean square difference, so that it is in the unit of
    pixels and does not depend on how errors are spread over frames.

    Args:
        lpips: Distance of two videos [1,3,T,H,W] in [-1,1], averaged over frames (the LPIPS mode of the
            perceptual loss); None leaves the metric out.
        features: Network behind `rfvd`; None leaves the metric out.
    """

    def __init__(
        self,
        lpips: Callable[[Tensor, Tensor], Tensor | float] | None = None,
        *,
        features: VideoFeatures | None = None,
    ) -> None:
        measures = ("psnr_db", "ssim", "flicker_error", *(("lpips_vgg",) if lpips is not None else ()))
        super().__init__("video", measures, _CHANGES)
        self._lpips = lpips
        self._frechet = None if features is None else FrechetDistance(features)

    def state(self) -> Tensor:
        """See `QualitySums.state`."""
        own = super().state()
        return own if self._frechet is None else torch.cat([own, self._frechet.state()])

    def merge(self, state: Tensor) -> None:
        """See `QualitySums.merge`."""
        size = len(self._fields)
        super().merge(state[:size])
        if self._frechet is not None:
            self._frechet.merge(state[size:])

    @torch.no_grad()
    def update(
        self, original_BCTHW: Tensor, reconstruction_BCTHW: Tensor, *, names: Sequence[str] | None = None
    ) -> None:
        """Adds a batch of clips; computes on the device they are on.

        Args:
            original_BCTHW: [B,3,T,H,W] in [-1,1], any float type.
            reconstruction_BCTHW: Same shape.
            names: Of the clips, for what is said of them.

        Raises:
            DataError: If the shapes differ.
        """
        _check_shapes(original_BCTHW, reconstruction_BCTHW)
        clips = zip(original_BCTHW.float(), reconstruction_BCTHW.float(), strict=True)
        for name, (original_CTHW, output_CTHW) in zip(
            clip_names(names, len(original_BCTHW)), clips, strict=True
        ):
            self._add_clip(name, original_CTHW, nan_where_not_finite(output_CTHW).clamp(-1, 1))

    def compute(self) -> dict[str, float]:
        """Returns what could be judged: `psnr_db`, and unless all clips were left out `ssim`,
        `flicker_error` and `flicker_ratio`; with their networks `lpips_vgg` and, of two clips or more,
        `rfvd`.

        Raises:
            DataError: If no clip was added.
        """
        result, sums = self._means(), self._totals()
        if sums["original_change"] != 0:
            result["flicker_ratio"] = sums["reconstruction_change"] / sums["original_change"]
        if self._frechet is not None:
            result |= self._frechet.compute()
        return result

    def _add_clip(self, name: str, x_CTHW: Tensor, y_CTHW: Tensor) -> None:
        x_TCHW, y_TCHW = (((video + 1) / 2).clamp(0, 1).transpose(0, 1) for video in (x_CTHW, y_CTHW))
        is_small = min(x_TCHW.shape[2:]) < _SSIM_WINDOW
        found: dict[str, Finding] = {
            "psnr_db": _psnr_db(x_TCHW, y_TCHW),
            "ssim": f"smaller than {_SSIM_WINDOW}x{_SSIM_WINDOW}" if is_small else _ssim(x_TCHW, y_TCHW),
            "flicker_error": _ONE_FRAME,
        }
        changes = dict.fromkeys(_CHANGES, 0.0)
        if len(x_TCHW) > 1:
            x_change, y_change = x_TCHW.diff(dim=0), y_TCHW.diff(dim=0)
            found["flicker_error"] = float((y_change - x_change).abs().mean())
            original_change = float(x_change.abs().mean())
            if original_change == 0:
                self._leave_out(name, "flicker_ratio", "the original does not move")
            else:
                changes = dict(zip(_CHANGES, (original_change, float(y_change.abs().mean())), strict=True))
        else:
            self._leave_out(name, "flicker_ratio", _ONE_FRAME)
        if self._lpips is not None:
            found["lpips_vgg"] = float(self._lpips(y_CTHW[None], x_CTHW[None]))
        if self._frechet is not None:
            self._frechet.update(x_CTHW[None], y_CTHW[None])
        self._add(name, found, changes)


_ONE_FRAME = "one frame"


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


def _check_shapes(original: Tensor, reconstruction: Tensor) -> None:
    shape, other = list(original.shape), list(reconstruction.shape)
    if shape != other or len(shape) != 5:
        raise DataError(
            f"video quality: both videos must have one shape [B,3,T,H,W], got {shape} and {other}."
        )
