"""A discriminator of complex spectrograms, one for each window length.

Shape suffixes: B batch, C channels, N samples, T frames of the spectrogram, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

_SLOPE = 0.2
_DILATIONS = (1, 2, 4)


class SpectrumDiscriminator(nn.Module):
    """Judges patches of time and frequency of one STFT, real and imaginary part as channels.

    Five layers and a head, all with weight norm; three of them halve the frequencies and look 1, 2 and 4
    frames apart. The window is a Hann window of the FFT's size, the hop a quarter of it; the spectrum is
    divided by the window's norm and computed in fp32 whatever the network computes in.

    Args:
        channels: Of the waveforms.
        fft_size: Of the window, in samples.
        width: Channels of every layer.

    Source: MS-STFT of EnCodec (Defossez et al. 2022, figure 2; facebookresearch/encodec, encodec/msstftd.py).
    Deviation: the ends of a clip are padded with zeros, so that clips shorter than a window are judged too.
    """

    def __init__(self, channels: int, *, fft_size: int, width: int) -> None:
        super().__init__()
        self._fft_size = fft_size
        convs = [nn.Conv2d(2 * channels, width, (3, 9), padding=(1, 4))]
        convs += [
            nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            for dilation in _DILATIONS
        ]
        convs.append(nn.Conv2d(width, width, 3, padding=1))
        self.body = nn.ModuleList(weight_norm(conv) for conv in convs)
        self.head = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wave_BCN: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits [B, 1, T, F / 8], and what each layer gave."""
        hidden, features = self._spectrum(wave_BCN).to(next(self.parameters()).dtype), []
        for layer in self.body:
            hidden = F.leaky_relu(layer(hidden), _SLOPE)
            features.append(hidden)
        return self.head(hidden), features

    def _spectrum(self, wave_BCN: Tensor) -> Tensor:
        window = torch.hann_window(self._fft_size, dtype=wave_BCN.dtype, device=wave_BCN.device)
        spectrum = torch.stft(
            wave_BCN.flatten(0, 1),
            n_fft=self._fft_size,
            hop_length=self._fft_size // 4,
            window=window,
            pad_mode="constant",
            return_complex=True,
        )
        parts_B_FT2 = torch.view_as_real(spectrum) / window.norm()
        parts_BCFT2 = torch.unflatten(parts_B_FT2, 0, wave_BCN.shape[:2])
        return parts_BCFT2.permute(0, 1, 4, 3, 2).flatten(1, 2)
