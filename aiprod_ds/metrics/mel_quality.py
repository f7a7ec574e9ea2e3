"""How close reconstructed log-mel spectrograms are to their originals; measured, never trained.

Shapes: B batch, C channels, T frames, M bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiprod_ds.metrics.quality_sums import QualitySums


class MelQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its length.

        log_mel_l1 = mean over clips of mean|X - Y|      X, Y natural logarithms of mel magnitudes

    Worked number: a spectrogram e times too loud everywhere has 1.
    """

    def __init__(self) -> None:
        super().__init__("mel", ("clips", "log_mel_l1"))

    @torch.no_grad()
    def update(self, original_BCTM: Tensor, reconstruction_BCTM: Tensor) -> None:
        """Adds a batch of clips, [B,C,T,M] both."""
        errors_B = (reconstruction_BCTM.double() - original_BCTM.double()).abs().flatten(1).mean(1)
        self._add([len(errors_B), float(errors_B.sum())])

    def compute(self) -> dict[str, float]:
        """Returns `log_mel_l1`.

        Raises:
            DataError: If no clip was added.
        """
        sums = self._totals()
        return {"log_mel_l1": sums["log_mel_l1"] / sums["clips"]}
