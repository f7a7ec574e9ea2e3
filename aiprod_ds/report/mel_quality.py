"""How close reconstructed log-mel spectrograms are to their originals; measured, never trained.

Shapes: B batch, C channels, T frames, M bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiprod_ds.errors import DataError


class MelQuality:
    """Accumulates clip by clip; every clip has the same weight whatever its length.

        log_mel_l1 = mean over clips of mean|X - Y|      X, Y natural logarithms of mel magnitudes

    Worked number: a spectrogram e times too loud everywhere has 1.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)  # clips, their errors

    @torch.no_grad()
    def update(self, original_BCTM: Tensor, reconstruction_BCTM: Tensor) -> None:
        """Adds a batch of clips, [B,C,T,M] both."""
        errors_B = (reconstruction_BCTM.double() - original_BCTM.double()).abs().flatten(1).mean(1)
        self._sums += torch.stack([torch.tensor(float(len(errors_B)), dtype=torch.float64), errors_B.sum()])

    def state(self) -> Tensor:
        """Returns the sums so far, 1-D float64 on the CPU; states of several ranks add up."""
        return self._sums.clone()

    def merge(self, state: Tensor) -> None:
        """Adds the `state()` of another accumulator."""
        self._sums += state.to(self._sums)

    def compute(self) -> dict[str, float]:
        """Returns `log_mel_l1`.

        Raises:
            DataError: If no clip was added.
        """
        clips, errors = self._sums.tolist()
        if clips == 0:
            raise DataError("mel quality: needs at least one clip, got none. Check the validation data.")
        return {"log_mel_l1": errors / clips}
