"""Losses in fp32, each a record of a total and its named terms.

Read `kl.py` first, for how a formula is written down here, then `video.py`, which adds terms up.
Called by the trainers.
Not here: weights and their defaults (`aiprod_ds.config.losses`), and measures that are never trained
(`aiprod_ds.metrics`).
"""

from aiprod_ds.losses.audio import AudioVAELoss
from aiprod_ds.losses.perceptual import PerceptualLoss
from aiprod_ds.losses.spectral import SpectralLoss
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.losses.video import VideoVAELoss

__all__ = ["AudioVAELoss", "LossTerms", "PerceptualLoss", "SpectralLoss", "VideoVAELoss"]
