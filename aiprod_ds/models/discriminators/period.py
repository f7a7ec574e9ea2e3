"""A discriminator of every p-th sample of a waveform, one for each period.

Shape suffixes: B batch, C channels, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

_SLOPE = 0.1
_WIDTHS = (1, 4, 16, 32, 32)  # times the width


class PeriodDiscriminator(nn.Module):
    """Judges the samples that are a period apart: the waveform as a picture [N / period, period], whose
    columns are never mixed.

    Four layers that take every third row, one that keeps them, and a head, all with weight norm. The end of a
    clip is reflected until the period divides it.

    Args:
        channels: Of the waveforms.
        period: In samples.
        width: Channels of the first layer; the others have 4, 16, 32 and 32 times as many.

    Source: multi-period discriminator of HiFi-GAN (Kong et al. 2020, section 2.3; jik876/hifi-gan,
    models.py).
    """

    def __init__(self, channels: int, *, period: int, width: int) -> None:
        super().__init__()
        self._period = period
        self.body, last = nn.ModuleList(), channels
        for index, times in enumerate(_WIDTHS):
            stride = 3 if index < len(_WIDTHS) - 1 else 1
            conv = nn.Conv2d(last, width * times, (5, 1), stride=(stride, 1), padding=(2, 0))
            self.body.append(weight_norm(conv))
            last = width * times
        self.head = weight_norm(nn.Conv2d(last, 1, (3, 1), padding=(1, 0)))

    def forward(self, wave_BCN: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits [B, 1, rows, period], and what each layer gave."""
        missing = -wave_BCN.shape[-1] % self._period
        padded_BCN = F.pad(wave_BCN, (0, missing), mode="reflect") if missing else wave_BCN
        hidden = torch.unflatten(padded_BCN, -1, (-1, self._period)).to(next(self.parameters()).dtype)
        features = []
        for layer in self.body:
            hidden = F.leaky_relu(layer(hidden), _SLOPE)
            features.append(hidden)
        return self.head(hidden), features
