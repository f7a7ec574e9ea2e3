"""What an audio VAE must offer, and the one module that the engine trains.

Shape suffixes: B batch, C channels, N samples, L latent channels (time follows). `AudioVAE` holds a model of
waveforms; models of mel spectrograms are in `mel_vae.py`. `wrap_audio_vae` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.models.mel_vae import MelVAE, is_mel_model, mel_hop
from aiprod_ds.models.posterior import decoded_sample, draw_latent, split_posterior
from aiprod_ds.models.shapes import declared_number, on_meta
from aiprod_ds.models.vae import WrappedVAE, require_vae

_PROBE_SAMPLES = 2**16  # a multiple of most published hops, and long against what any codec cuts off
_PROBE_CHANNELS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFacts:
    """What an audio VAE takes.

    Attributes:
        sample_rate_hz: The rate that it is made for; None if it does not say.
        channels: Channels of its waveforms; None if it does not say.
        hop: Samples that become one latent.
    """

    sample_rate_hz: int | None
    channels: int | None
    hop: int


class AudioVAE(WrappedVAE):
    """Wraps any VAE of waveforms for training.

    The model must offer `encode(wave_BCN)`, which returns an object with `latent_dist` (diffusers), a
    `(mean, logvar)` pair or a plain latent tensor, and `decode(latent)`, which returns a tensor or an object
    with `sample`.
    """

    def forward(
        self, wave_BCN: Tensor, noise: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Encodes, draws a latent and decodes.

        Args:
            wave_BCN: [B,C,N] in [-1,1], in the module's dtype.
            noise: See `draw_latent`; None, as in evaluation, takes the posterior's mode.

        Returns:
            (reconstruction_BCN, mean, logvar): the first cropped to N where the codec pads, the last two
            [B,L,T] fp32; logvar is None for a deterministic autoencoder.

        Raises:
            EngineError: If the model returns fewer samples than it was given, or another number of channels.
        """
        latent, mean, logvar = draw_latent(self.encoded(wave_BCN), noise)
        decoded_BCN = decoded_sample(self.vae.decode(latent.to(wave_BCN.dtype)))
        if decoded_BCN.shape[:2] != wave_BCN.shape[:2] or decoded_BCN.shape[2] < wave_BCN.shape[2]:
            raise EngineError(
                f"model: the reconstruction must have the input's batch and channels and at least its length "
                f"{tuple(wave_BCN.shape)}, got {tuple(decoded_BCN.shape)}. Set data.channels to the model's "
                "own and "
                "model.temporal_stride to the samples that become one latent."
            )
        return decoded_BCN[..., : wave_BCN.shape[2]], mean, logvar


def wrap_audio_vae(vae: nn.Module) -> AudioVAE | MelVAE:
    """Returns the module to train: a `MelVAE` for a model of mel spectrograms, else an `AudioVAE`.

    Raises:
        ConfigError: If the model lacks `encode` or `decode`.
    """
    return MelVAE(vae) if is_mel_model(vae) else AudioVAE(vae)


def audio_facts(vae: nn.Module, *, hop: int | None = None) -> AudioFacts:
    """Returns what the model takes; the hop is the given one, else measured by encoding shapes, else the
    declared one.

    Raises:
        ConfigError: If the model is no VAE, or the hop is neither declared nor measurable.
    """
    require_vae(vae)
    if hop is None:
        hop = mel_hop(vae) if is_mel_model(vae) else _measured_hop(vae) or declared_number(vae, "hop_length")
    if hop is None:
        raise ConfigError(
            f"model: the hop of {type(vae).__name__} is neither declared nor measurable. "
            "Set model.temporal_stride to the samples that become one latent."
        )
    return AudioFacts(sample_rate_hz=_rate(vae), channels=_channels(vae), hop=hop)


def audio_strides(vae: nn.Module, config: ModelConfig) -> ModelStrides:
    """Returns the strides of a clip whose frames are samples: the configured one, else `audio_facts`.

    Raises:
        ConfigError: If the stride is neither given nor to be found.
    """
    return ModelStrides(spatial=1, temporal=audio_facts(vae, hop=config.temporal_stride).hop, is_causal=False)


def _rate(vae: nn.Module) -> int | None:
    return declared_number(vae, "sampling_rate", "sample_rate", "sample_rate_hz")


def _channels(vae: nn.Module) -> int | None:
    return declared_number(vae, "audio_channels", "in_channels")


def _measured_hop(vae: nn.Module) -> int | None:
    shapes_only = on_meta(vae).eval()
    dtype = next((parameter.dtype for parameter in vae.parameters()), torch.float32)
    probe_BCN = torch.zeros(1, _channels(vae) or _PROBE_CHANNELS, _PROBE_SAMPLES, device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            latent, _ = split_posterior(shapes_only.encode(probe_BCN))  # type: ignore[operator]
        # A codec may cut off or add a few latents at the ends, so the quotient is rounded to one that divides
        # the probe.
        return round(_PROBE_SAMPLES / latent.shape[-1]) or None
    except Exception:  # noqa: BLE001  a model that is no audio VAE may fail in any way
        return None  # some models make tensors on the CPU inside forward
