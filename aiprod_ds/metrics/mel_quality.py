"""How close reconstructed log-mel spectrograms are to their originals; measured, never trained.

Shapes: B batch, C channels, T frames, M bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aiprod_ds.metrics.quality_sums import QualitySums, clip_names


class MelQuality(QualitySums):
    """Accumulates clip by clip; every clip has the same weight whatever its length.

        log_mel_l1 = mean over clips of mean|X - Y|      X, Y natural logarithms of mel magnitudes

    An original whose spectrogram is one value everywhere is digital silence, of which only the floor of the
    logarithm is left: it is not judged.

    Worked number: a spectrogram e times too loud everywhere has 1.
    """

    def __init__(self) -> None:
        super().__init__("mel", ("log_mel_l1",))

    @torch.no_grad()
    def update(
        self, original_BCTM: Tensor, reconstruction_BCTM: Tensor, *, names: Sequence[str] | None = None
    ) -> None:
        """Adds a batch of clips, [B,C,T,M] both.

        Args:
            original_BCTM: Any float type.
            reconstruction_BCTM: Same shape.
            names: Of the clips, for what is said of them.
        """
        errors_B = (reconstruction_BCTM.double() - original_BCTM.double()).abs().flatten(1).mean(1)
        is_silent_B = original_BCTM.flatten(1).amax(1) == original_BCTM.flatten(1).amin(1)
        for name, error, is_silent in zip(
            clip_names(names, len(errors_B)), errors_B.tolist(), is_silent_B.tolist(), strict=True
        ):
            self._add(name, {"log_mel_l1": "digital silence" if is_silent else error})

    def compute(self) -> dict[str, float]:
        """Returns `log_mel_l1`, unless every original was silent.

        Raises:
            DataError: If no clip was added.
        """
        return self._means()
