"""Latents to pictures and sound: the VAEs that decode, on the CPU between uses so that training has the
device to itself.

Owns one clip's normalised latents in, one clip out; the inverse of `encoders`. Called by previews and by
sampling. Shape suffixes: B batch, C channels, T frames, H height, W width, F latent frames, N samples, M mel
bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.codec.encoders import DTYPES, AudioForm
from aiprod_ds.codec.normalization import normalization_of
from aiprod_ds.config.encode import Precision
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.sample import PreviewConfig
from aiprod_ds.errors import ConfigError, EngineError
from aiprod_ds.media.clips import Clip, make_clip
from aiprod_ds.media.mp4 import Sound
from aiprod_ds.models.audio_vae import audio_facts, wrap_audio_vae
from aiprod_ds.models.mel_inverse import approximate_sound
from aiprod_ds.models.mel_vae import MelVAE, is_mel_model
from aiprod_ds.models.posterior import decoded_sample, split_posterior
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.shapes import declared_number
from aiprod_ds.models.video_vae import VideoVAE, video_strides

_REFLECTED_SAMPLES = 1024  # at least what the mel front end reflects at an end


class VideoDecoder:
    """A frozen video VAE.

    Raises:
        ConfigError: If it cannot be built.
    """

    def __init__(self, config: ModelConfig, *, precision: Precision, seed: int) -> None:
        vae = build_model(config, seed=seed)
        self.strides = video_strides(vae, config)
        self._normalization = normalization_of(vae, config)
        self._vae = _frozen(VideoVAE(vae).vae, precision)

    def decode(self, latents_CFHW: Tensor, *, device: torch.device) -> Tensor:
        """Returns pictures [3,T,H,W] fp32 on the CPU, in [-1,1] as far as the VAE keeps to it, of normalised
        latents.

        Raises:
            DataError: If the VAE's statistics are of another number of channels.
            EngineError: If the device has too little memory.
        """
        return _run(self._vae, self._decode, self._normalization.denormalize(latents_CFHW[None]), device)

    def latent_shape(self, *, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Returns [C,F,H',W'] of a clip whose frames and pixels the VAE takes."""
        strides = self.strides
        channels = _encoded(self._vae, torch.zeros(1, 3, 1, strides.spatial, strides.spatial)).shape[1]
        return channels, strides.latents(frames), height // strides.spatial, width // strides.spatial

    def _decode(self, latent: Tensor) -> Tensor:
        if not declared_number(self._vae, "timestep_conditioning"):  # True counts as a number
            return decoded_sample(self._vae.decode(latent))
        # LTX-Video 0.9.1 and later can decode what is a little noisy; 0 is the default of diffusers'
        # pipeline.
        return decoded_sample(self._vae.decode(latent, latent.new_zeros(1)))


class AudioDecoder:
    """A frozen audio VAE; one of mel spectrograms, with what makes sound of them.

    Args:
        vocoder: Makes sound of mel spectrograms. None: it is approximated.

    Raises:
        ConfigError: If a model cannot be built or does not declare its rate, or there is a vocoder for a VAE
            of waveforms.
    """

    def __init__(
        self, config: ModelConfig, *, vocoder: ModelConfig | None, precision: Precision, seed: int
    ) -> None:
        vae = build_model(config, seed=seed)
        self._facts = audio_facts(vae, hop=config.temporal_stride)
        self._rate_hz = _require_rate(vae, self._facts.sample_rate_hz)
        self._normalization = normalization_of(vae, config)
        wrapped = wrap_audio_vae(vae)
        self._mel = wrapped.mel if isinstance(wrapped, MelVAE) else None
        self._vae = _frozen(wrapped.vae, precision)
        if self._mel is None and vocoder is not None:
            raise ConfigError(
                f"vocoder: has no effect for {type(vae).__name__}, which decodes to waveforms. Remove it."
            )
        self._vocoder = None if vocoder is None else _frozen(build_model(vocoder, seed=seed), precision)

    def decode(self, latents: Tensor, *, device: torch.device) -> Sound:
        """Returns sound [C,N] fp32 on the CPU, of normalised latents [C,T] or [C,T,M].

        Raises:
            DataError: If the VAE's statistics are of another number of channels.
            EngineError: If the device has too little memory.
        """
        denormalized = self._normalization.denormalize(latents[None])
        decoded = _run(
            self._vae, lambda latent: decoded_sample(self._vae.decode(latent)), denormalized, device
        )
        if self._mel is None:
            return Sound(samples=decoded, sample_rate_hz=self._rate_hz)
        if self._vocoder is None:
            hop = declared_number(self._vae, "mel_hop_length")
            assert hop is not None, "the mel front end was built with it"
            wave_CN = approximate_sound(decoded, sample_rate_hz=self._rate_hz, hop=hop)
            return Sound(samples=wave_CN, sample_rate_hz=self._rate_hz)
        vocoder_rate_hz = _require_rate(
            self._vocoder, declared_number(self._vocoder, "output_sampling_rate", "sampling_rate")
        )
        return Sound(
            samples=_run(self._vocoder, self._vocoder, decoded[None], device), sample_rate_hz=vocoder_rate_hz
        )

    def latent_shape(self, seconds: float) -> tuple[int, ...]:
        """Returns [C,T] or [C,T,M] of a sound that lasts so long, as encoding makes them.

        Raises:
            ConfigError: If the VAE does not declare its channels.
        """
        if self._facts.channels is None:
            name = type(self._vae).__name__
            raise ConfigError(
                "audio_vae: must declare its channels as audio_channels or in_channels, got none from "
                f"{name}."
            )
        form = AudioForm(sample_rate_hz=self._rate_hz, channels=self._facts.channels, hop=self._facts.hop)
        silence_BCN = torch.zeros(1, form.channels, form.hop * -(-_REFLECTED_SAMPLES // form.hop))
        channels, _, *bands = _encoded(
            self._vae, silence_BCN if self._mel is None else self._mel(silence_BCN)
        ).shape[1:]
        return channels, form.num_latents(seconds), *bands


class LatentDecoder:
    """The VAEs of a diffusion model, built at the first use.

    Args:
        audio_vae: Of the sound; None where there is none.
        config: Precision, and what makes sound of mel spectrograms.
    """

    def __init__(
        self, vae: ModelConfig, audio_vae: ModelConfig | None, config: PreviewConfig, *, seed: int
    ) -> None:
        self._vae = vae
        self._audio_vae = audio_vae
        self._config = config
        self._seed = seed

    @cached_property
    def video(self) -> VideoDecoder:
        """Makes the pictures."""
        return VideoDecoder(self._vae, precision=self._config.decode_precision, seed=self._seed)

    @cached_property
    def audio(self) -> AudioDecoder | None:
        """Makes the sound; None where there is none."""
        if self._audio_vae is None:
            return None
        precision, vocoder = self._config.decode_precision, self._config.vocoder
        return AudioDecoder(self._audio_vae, vocoder=vocoder, precision=precision, seed=self._seed)

    def clip(self, latents: Mapping[str, Tensor], *, frame_rate_hz: float, device: torch.device) -> Clip:
        """Returns a clip of normalised latents [C,...] by modality; sound only where there is an audio VAE.

        Raises:
            ConfigError: If a VAE cannot be built.
            DataError: If the statistics of a VAE are of another number of channels.
            EngineError: If the device has too little memory.
        """
        video_CTHW = self.video.decode(latents["video"], device=device)
        sound = None if self.audio is None else self.audio.decode(latents["audio"], device=device)
        return make_clip(video_CTHW, frame_rate_hz=frame_rate_hz, sound=sound)

    def replacements(self) -> tuple[str, ...]:
        """Returns what is done in place of decoding by a network, in words; builds shapes only."""
        if self._audio_vae is None or self._config.vocoder is not None:
            return ()
        if not is_mel_model(build_model(self._audio_vae, seed=self._seed, device="meta")):
            return ()
        return (
            (
                "sampled sound is approximated from mel spectrograms without a vocoder, by least squares and "
                "Griffin-Lim"
            ),
        )


def _frozen(module: Any, precision: Precision) -> Any:
    # diffusers' own `to` warns of modules to keep in fp32, of which VAEs have none.
    cast: nn.Module = nn.Module.to(module.eval().requires_grad_(False), DTYPES[precision])
    return cast


def _require_rate(model: nn.Module, rate_hz: int | None) -> int:
    if rate_hz is None:
        raise ConfigError(
            f"audio_vae: sound needs a sample rate, got none declared by {type(model).__name__}. Add it to "
            "the class."
        )
    return rate_hz


def _run(
    module: nn.Module, compute: Callable[[Tensor], Tensor], given: Tensor, device: torch.device
) -> Tensor:
    """Returns `compute(given)` without the axis B, fp32 on the CPU; `module` is on the device meanwhile."""
    dtype = next(module.parameters()).dtype
    gpus = [device] if device.type == "cuda" else []
    try:
        with _placed(module, device), torch.inference_mode(), torch.random.fork_rng(gpus):
            torch.manual_seed(0)  # decoders of LTX-Video 0.9.1 and later draw noise
            return compute(given.to(device, dtype))[0].float().cpu()
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"decoder: {type(module).__name__} needs more memory than {device} has for {list(given.shape)}. "
            "Sample smaller or "
            "shorter clips, use a smaller decode_precision, or train without previews "
            "(evaluation.num_pictures: 0)."
        ) from error


@contextmanager
def _placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    try:
        module.to(device)
        yield
    finally:
        module.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what decoding took is of sizes that training has no use for


@torch.inference_mode()
def _encoded(vae: Any, given: Tensor) -> Tensor:
    mean, _ = split_posterior(vae.encode(given.to(next(vae.parameters()).dtype)))
    return mean
