"""The model of the soak: small, and without finite gradients as long as a file stands somewhere.

Named by the configuration that `soak.py` writes, as `soak_model:SpikingVAE`.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from aiprod_ds.testing.tiny import TinyVideoVAE


class SpikingVAE(TinyVideoVAE):
    """`TinyVideoVAE`, whose reconstructions in training are NaN while `flag` exists.

    Args:
        flag: Path of a file; its content does not matter.
    """

    def __init__(self, flag: str) -> None:
        super().__init__()
        self._flag = Path(flag)

    def decode(self, latent: Tensor) -> Tensor:
        """Returns video [B, 3, T, H, W] for latents [B, 4, (T + 1) / 2, H / 4, W / 4]."""
        decoded = super().decode(latent)
        return decoded * math.nan if self.training and self._flag.exists() else decoded
