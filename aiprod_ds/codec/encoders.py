"""The VAEs that encode: built, cast and moved, with the normalisation of their latents and their fingerprint.

Owns one clip in, one normalised latent out. Called by `aiprod_ds.encode`; trainers ask here for the
fingerprint of their latents. Shape suffixes: B batch, C channels, T frames, H height, W width, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.codec.normalization import LatentNormalization, normalization_of
from aiprod_ds.codec.tiling import tiles_off, use_tiles
from aiprod_ds.config.encode import AudioEncoderConfig, VideoEncoderConfig
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError, DataError, EngineError
from aiprod_ds.models.audio_vae import audio_facts, wrap_audio_vae
from aiprod_ds.models.fingerprint import module_fingerprint
from aiprod_ds.models.mel_vae import MelVAE
from aiprod_ds.models.posterior import split_posterior
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.video_vae import VideoVAE, video_strides

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioForm:
    """What an audio encoder takes: rate, channels, the samples that become one latent, and the loudness; None
    leaves it."""

    sample_rate_hz: int
    channels: int
    hop: int
    loudness_lufs: float | None = None

    def num_latents(self, seconds: float) -> int:
        """Returns the latents nearest to a time span, at least one.

        round(seconds * rate / hop). Worked number: 17 frames at 24 Hz are 31,237.5 samples at 44,100 Hz, 15
        latents of 2048.
        """
        return max(1, round(seconds * self.sample_rate_hz / self.hop))


class VideoEncoder:
    """A frozen video VAE on a device.

    Args:
        device: Where it runs.

    Raises:
        ConfigError: If the model cannot be built, or cannot encode in tiles where these are configured.
    """

    def __init__(self, config: VideoEncoderConfig, *, seed: int, device: torch.device) -> None:
        vae = build_model(config.model, seed=seed)
        self.normalization = normalization_of(vae, config.model)
        self._vae: Any = _frozen(VideoVAE(vae), config.precision, device).vae
        self._input = (device, DTYPES[config.precision])
        if config.tiling is not None:
            use_tiles(self._vae, config.tiling, video_strides(vae, config.model))

    def encode(self, video_CTHW: Tensor) -> Tensor:
        """Returns the posterior's mode, normalised: [L,T',H',W'] fp32 on the CPU, of [3,T,H,W] in [-1,1].

        Raises:
            DataError: If a latent is not finite.
            EngineError: If the device has too little memory.
        """
        return _encode(self._vae, video_CTHW.to(*self._input), self.normalization)

    def encode_whole(self, video_CTHW: Tensor) -> Tensor:
        """Returns what `encode` returns, without tiles and chunks."""
        with tiles_off(self._vae):
            return self.encode(video_CTHW)


class AudioEncoder:
    """A frozen audio VAE on a device.

    Args:
        device: Where it runs.

    Raises:
        ConfigError: If the model cannot be built, or its rate or channels are neither declared nor
            configured.
    """

    def __init__(self, config: AudioEncoderConfig, *, seed: int, device: torch.device) -> None:
        vae = build_model(config.model, seed=seed)
        self.form = audio_form(vae, config)
        self.normalization = normalization_of(vae, config.model)
        wrapped = _frozen(wrap_audio_vae(vae), config.precision, device)
        self._vae: Any = wrapped.vae
        self._mel = wrapped.mel if isinstance(wrapped, MelVAE) else None
        self._input = (device, DTYPES[config.precision])

    def encode(self, wave_CN: Tensor) -> Tensor:
        """Returns the posterior's mode, normalised: [L,T] or [L,T,M] fp32 on the CPU, of [C,N] in [-1,1].

        N must be a multiple of the hop; T is N / hop. A mel model makes one latent more, of the frame that is
        centred on the end of the sound; it is left out.

        Raises:
            DataError: If a latent is not finite.
            EngineError: If the device has too little memory, or the model makes too few latents.
        """
        device, dtype = self._input
        # The spectrogram is taken in fp32, whatever the model's precision is.
        given = (wave_CN if self._mel is None else self._mel(wave_CN[None])[0]).to(device, dtype)
        latent = _encode(self._vae, given, self.normalization)
        count = wave_CN.shape[1] // self.form.hop
        if latent.shape[1] < count:
            raise EngineError(
                f"audio.model: must make {count} latents of {wave_CN.shape[1]} samples, got "
                f"{latent.shape[1]}. "
                "Set audio.model.temporal_stride to the samples that become one latent."
            )
        return latent[:, :count]


def audio_form(vae: nn.Module, config: AudioEncoderConfig) -> AudioForm:
    """Returns what an audio VAE takes: as configured, else as it declares; a model on the meta device will
    do.

    Raises:
        ConfigError: If rate or channels are neither configured nor declared, or both and different.
    """
    facts = audio_facts(vae)
    hop = config.model.temporal_stride or facts.hop
    rate_hz = _agreed("sample_rate_hz", config.sample_rate_hz, facts.sample_rate_hz)
    channels = _agreed("channels", config.channels, facts.channels)
    return AudioForm(sample_rate_hz=rate_hz, channels=channels, hop=hop, loudness_lufs=config.loudness_lufs)


def vae_fingerprint(config: ModelConfig, *, seed: int) -> str:
    """Returns the fingerprint that latents of this VAE carry: class, configuration, fp32 weights and
    normalisation."""
    vae = build_model(config, seed=seed)
    found: LatentNormalization = normalization_of(vae, config)
    return module_fingerprint(vae, list(found.mean), list(found.std))


def _agreed(name: str, configured: int | None, declared: int | None) -> int:
    known = declared if configured is None else configured
    if known is None:
        raise ConfigError(
            f"audio.{name}: must be given, because the model does not declare it. Set what it was trained "
            "with."
        )
    if declared not in {None, known}:
        raise ConfigError(
            f"audio.{name}: must be the model's, {declared}, got {known}. Remove it; files are converted."
        )
    return known


def _frozen(module: Any, precision: str, device: torch.device) -> Any:
    return module.eval().requires_grad_(False).to(device, DTYPES[precision])


@torch.inference_mode()
def _encode(vae: Any, given: Tensor, normalization: LatentNormalization) -> Tensor:
    try:
        mean, _ = split_posterior(vae.encode(given[None]))
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"encoder: needs more memory than {given.device} has for a clip of {list(given.shape)}. "
            "Set video.tiling, lower the shapes or use a smaller precision."
        ) from error
    latent = normalization.normalize(mean)[0].cpu()
    if not bool(latent.isfinite().all()):
        raise DataError(
            "its latents must be finite, got NaN or infinity. Use precision: fp32 or remove the clip"
        )
    return latent
