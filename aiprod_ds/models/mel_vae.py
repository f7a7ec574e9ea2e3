"""A VAE of log-mel spectrograms behind the face of a VAE of waveforms: the front end, and the module that the
engine trains.

Shape suffixes: B batch, C channels, N samples, F frequency bins, T frames, M mel bands, L latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.posterior import decoded_sample, draw_latent
from aiprod_ds.models.shapes import declared_number
from aiprod_ds.models.vae import WrappedVAE

_FFT_SIZE = 1024
_FLOOR = 1e-5


class LogMel:
    """Log-mel spectrogram, in fp32 whatever comes in.

        mel = ln(max(M |STFT(x)|, 1e-5))

    with a periodic Hann window of the FFT's size, frames centred on multiples of the hop, reflected ends, and
    M a Slaney filter bank from 0 to half the sample rate. A clip of n samples has 1 + n // hop frames.

    Worked number: silence is ln(1e-5) = -11.512925 in every band.

    Source: the magnitude, the natural logarithm and the floor are those of `MelSTFT` in diffusers 0.42.1
    (pipelines/ltx2/vocoder.py), with FFT size 1024 and hop 160 in place of its 512 and 80. diffusers keeps no
    front end for AutoencoderKLLTX2Audio, so that published weights expect exactly these numbers is not
    proven.

    Args:
        sample_rate_hz: Of the waveforms; the bands end at half of it.
        hop: Samples between frames.
        num_bands: M.
    """

    def __init__(self, *, sample_rate_hz: int, hop: int, num_bands: int) -> None:
        self._hop = hop
        self._window = torch.hann_window(_FFT_SIZE)
        filters_FM: Tensor = melscale_fbanks(
            _FFT_SIZE // 2 + 1,
            0.0,
            sample_rate_hz / 2,
            num_bands,
            sample_rate_hz,
            norm="slaney",
            mel_scale="slaney",
        )
        self._filters_FM = filters_FM

    def __call__(self, wave_BCN: Tensor) -> Tensor:
        """Returns [B,C,T,M] fp32 for [B,C,N] in [-1,1], N above 512."""
        with torch.autocast(device_type=wave_BCN.device.type, enabled=False):
            flat_BN = wave_BCN.float().flatten(0, 1)
            window = self._window.to(flat_BN.device)
            spectrum_BFT = torch.stft(flat_BN, _FFT_SIZE, self._hop, window=window, return_complex=True)
            mel_BTM = spectrum_BFT.abs().transpose(1, 2) @ self._filters_FM.to(flat_BN.device)
            return mel_BTM.clamp(min=_FLOOR).log().reshape(*wave_BCN.shape[:2], *mel_BTM.shape[1:])


class MelVAE(WrappedVAE):
    """Wraps a VAE of log-mel spectrograms, such as diffusers' AutoencoderKLLTX2Audio, for training.

    The model must offer `encode(mel_BCTM)` and `decode(latent)` as `AudioVAE` asks for them, and a
    configuration with `sample_rate`, `mel_hop_length` and `mel_bins`. What is reconstructed is the
    spectrogram; a vocoder is not part of it.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__(vae)
        # Not a submodule with buffers: a cast of the module around must not make the filters half precision.
        self.mel = LogMel(
            sample_rate_hz=_declared(vae, "sample_rate"),
            hop=_declared(vae, "mel_hop_length"),
            num_bands=_declared(vae, "mel_bins"),
        )

    def forward(
        self, wave_BCN: Tensor, noise: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes the spectrogram, encodes, draws a latent and decodes.

        Args:
            wave_BCN: [B,C,N] in [-1,1]; fp32 even when the module is not, because 16 bits bury quiet bands in
                rounding noise.
            noise: See `draw_latent`; None, as in evaluation, takes the posterior's mode.

        Returns:
            (mel_BCTM, mean, logvar): the reconstructed spectrogram, of which `self.mel(wave_BCN)` is the
            original, in the module's dtype and as many frames; the last two fp32; logvar is None for a
            deterministic autoencoder.

        Raises:
            EngineError: If the model returns a smaller spectrogram than it was given.
        """
        dtype = next(self.vae.parameters()).dtype
        mel_BCTM = self.mel(wave_BCN)
        latent, mean, logvar = draw_latent(self.encoded(mel_BCTM.to(dtype)), noise)
        decoded_BCTM = decoded_sample(self.vae.decode(latent.to(dtype)))
        batch, channels, frames, bands = mel_BCTM.shape
        if (
            decoded_BCTM.shape[:2] != (batch, channels)
            or decoded_BCTM.shape[2] < frames
            or decoded_BCTM.shape[3] != bands
        ):
            raise EngineError(
                "model: the reconstruction must have at least the frames of the spectrogram "
                f"{tuple(mel_BCTM.shape)}, "
                f"got {tuple(decoded_BCTM.shape)}. Set model.temporal_stride to the samples that become one "
                "latent."
            )
        return decoded_BCTM[:, :, :frames], mean, logvar


def is_mel_model(vae: nn.Module) -> bool:
    """Returns whether the model's configuration speaks of mel bands."""
    return declared_number(vae, "mel_bins") is not None


def mel_hop(vae: nn.Module) -> int:
    """Returns the samples that become one latent: the hop of the spectrogram times the frames that become
    one.

    Worked number: hop 160 and 4 frames make 640 samples; 640 * k samples have 1 + 4 * k frames, which a
    causal model takes.

    Raises:
        ConfigError: If the model's configuration lacks one of them.
    """
    return _declared(vae, "mel_hop_length") * _declared(vae, "temporal_compression_ratio")


def _declared(vae: nn.Module, name: str) -> int:
    number = declared_number(vae, name)
    if number is None:
        raise ConfigError(
            f"model: a mel VAE must say {name} in its configuration, got none from {type(vae).__name__}."
        )
    return number
