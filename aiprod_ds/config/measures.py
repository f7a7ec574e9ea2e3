"""Which held-out measures a run takes beside those that cost nothing and need nothing.

Owns the schema; the formulas are in `aiprod_ds.metrics`, and what is missing is found by
`aiprod_ds.trainers.measures`. Field names are the YAML keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.schema import PositiveInt, StrictModel


class FvdConfig(StrictModel):
    """Fréchet distance of the features of a video network, of originals and reconstructions (rFVD)."""

    network: str = Field(min_length=1)
    """A TorchScript file (`i3d_torchscript.pt` gives published FVD), one of a hub repository
    (`owner/name/file.pt`), or the import path of what makes a network (`my_package.module:make`)."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Of the TorchScript file, which is checked before it is read. null: that of `i3d_torchscript.pt`. No
    effect on an import path, so refused there."""
    size: PositiveInt = 224
    """Height and width of the frames that the network sees: the shorter side is scaled to it, the middle
    cut out."""

    @model_validator(mode="after")
    def _hash_has_effect(self) -> Self:
        if self.sha256 is not None and ":" in self.network:
            raise ValueError(f"sha256: has no effect on an import path, got {self.network!r}. Remove it.")
        return self


class VideoMeasuresConfig(StrictModel):
    """Measures beside PSNR, SSIM and flicker."""

    lpips: Literal["auto", "on", "off"] = "auto"
    """LPIPS of every frame, with VGG16. `auto`: where the loss has loaded that network anyway. `on`: always;
    the weights are those of `loss.perceptual.weights` or lie in the torch hub cache."""
    fvd: FvdConfig | None = None
    """rFVD. Of few clips it is biased upwards: hold out at least twice as many as the network has
    features. null: not measured."""


class AudioMeasuresConfig(StrictModel):
    """Measures beside the distances of spectra and SI-SDR."""

    visqol: bool = False
    """ViSQOL in audio mode, 1 to about 4.7; needs the extra `perceptual`, clips of a second, and about as
    long as the clip lasts on one core."""
