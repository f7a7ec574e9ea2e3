"""A waveform that fits a log-mel spectrogram, where there is no vocoder: approximate, but it can be listened
to.

Owns the inverse of `LogMel` in `mel_vae.py`. Called where latents of a mel VAE are decoded for a preview.
Shape suffixes: C channels, N samples, F frequency bins, T frames, M mel bands.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import griffinlim
from torchaudio.transforms import InverseMelScale

_FFT_SIZE = 1024  # as in LogMel; the round trip in tests/unit/encode/test_sample.py fails if they differ
_NUM_ROUNDS = 32
_MOMENTUM = 0.99
_LOUDEST = math.log(_FFT_SIZE / 2)  # no mel band of a sound in [-1,1] reaches the sum of the Hann window
_FLOOR = math.log(1e-5)


def approximate_sound(mel_CTM: Tensor, *, sample_rate_hz: int, hop: int) -> Tensor:
    """Returns a sound whose log-mel spectrogram is near the given one: least squares for the bins, then
    Griffin-Lim.

    Mel bands say nothing of phases and little of high frequencies, so it sounds hollow even for the
    spectrogram of a real sound. The phases start at 0: nothing is drawn, and the same spectrogram makes the
    same sound.

    Source: Griffin and Lim 1984 with the momentum of Perraudin et al. 2013, as in torchaudio.

    Args:
        mel_CTM: [C,T,M] as `LogMel` makes them.
        sample_rate_hz: That of the sound; the bands end at half of it.
        hop: Samples between frames, as `LogMel` had them.

    Returns:
        [C,N] fp32, N = (T - 1) * hop, on the device of the spectrogram.
    """
    channels, frames, bands = mel_CTM.shape
    fewest = _FFT_SIZE // 2 // hop + 2  # Griffin-Lim reflects half a window at both ends
    padded_CTM = F.pad(mel_CTM.float(), (0, 0, 0, max(0, fewest - frames)), value=_FLOOR)
    inverse = InverseMelScale(
        _FFT_SIZE // 2 + 1, bands, sample_rate_hz, 0.0, sample_rate_hz / 2, norm="slaney", mel_scale="slaney"
    ).to(mel_CTM.device)
    magnitude_CFT: Tensor = inverse(padded_CTM.clamp(max=_LOUDEST).exp().transpose(1, 2).contiguous())
    sound_CN: Tensor = griffinlim(
        magnitude_CFT,
        torch.hann_window(_FFT_SIZE, device=mel_CTM.device),
        n_fft=_FFT_SIZE,
        hop_length=hop,
        win_length=_FFT_SIZE,
        power=1.0,
        n_iter=_NUM_ROUNDS,
        momentum=_MOMENTUM,
        length=None,
        rand_init=False,
    )
    return sound_CN.reshape(channels, -1)[:, : (frames - 1) * hop]
