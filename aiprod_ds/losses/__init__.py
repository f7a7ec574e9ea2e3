"""Losses in fp32, each a record of a total and its named terms."""

from aiprod_ds.losses.audio import AudioVAELoss
from aiprod_ds.losses.perceptual import PerceptualLoss
from aiprod_ds.losses.spectral import SpectralLoss
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.losses.video import VideoVAELoss

__all__ = ["AudioVAELoss", "LossTerms", "PerceptualLoss", "SpectralLoss", "VideoVAELoss"]
