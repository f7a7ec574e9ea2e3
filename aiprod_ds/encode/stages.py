"""The two kinds of tasks: captions become prompt embeddings, clips become latents of pictures and sound.

Owns what stands in an entry. Each stage holds its networks, so that those of the first are gone when the
second begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aiprod_ds.codec.encoders import AudioEncoder, VideoEncoder, vae_fingerprint
from aiprod_ds.config.encode import EncodeConfig, TextEncoderConfig
from aiprod_ds.data.latents import AUDIO_LATENTS, CONDITIONS, LATENTS, numbered
from aiprod_ds.encode.media import clip_rate_hz, start_seconds
from aiprod_ds.encode.reader import Loaded
from aiprod_ds.encode.tasks import Encoders, Task
from aiprod_ds.engine import dist
from aiprod_ds.models.text import build_text_encoder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """What is written: one file of one source."""

    source: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


class Stage(Protocol):
    """One kind of task.

    Attributes:
        title: What is encoded, in a word.
        encoders: What decides its entries.
    """

    title: str
    encoders: Encoders

    def entries(self, task: Task, loaded: Loaded) -> Iterator[Entry]:
        """Yields the entries of a task.

        Raises:
            DataError: If the clip cannot be encoded.
        """


class CaptionStage:
    """Encodes captions. Collective to make.

    Args:
        device: Where the encoder runs.
    """

    def __init__(self, config: TextEncoderConfig, *, seed: int, device: torch.device) -> None:
        self.title = "captions"
        encoder = build_text_encoder(config, seed=seed)
        fingerprint = dist.from_main(encoder.fingerprint)
        self.encoders = Encoders(
            fingerprints={CONDITIONS: fingerprint}, settings={CONDITIONS: config.precision}
        )
        self._encoder = encoder.to(device)

    def entries(self, task: Task, loaded: Loaded) -> Iterator[Entry]:  # noqa: ARG002  # a caption needs no reading
        """Yields the embeddings of the task's captions, in one entry.

        Raises:
            DataError: If a caption is too long.
        """
        tensors: dict[str, Tensor] = {}
        for index, caption in enumerate(task.record.captions):
            # One by one: what a caption becomes does not depend on those beside it.
            encoded = self._encoder.encode([caption]).tensors(0)
            tensors |= {numbered(name, index): tensor for name, tensor in encoded.items()}
        yield Entry(
            source=CONDITIONS, tensors=_stored(tensors), metadata=self.encoders.identity(task, CONDITIONS)
        )

    def empty_prompt(self) -> Entry:
        """Returns the embeddings of the empty caption, which stands in where a caption is left out."""
        tensors = self._encoder.encode([""]).tensors(0)
        return Entry(source=CONDITIONS, tensors=_stored(tensors), metadata=self.encoders.caption_identity(""))


class MediaStage:
    """Encodes pictures and sound. Collective to make.

    Args:
        device: Where the encoders run.
    """

    def __init__(self, config: EncodeConfig, *, device: torch.device) -> None:
        self.title = "clips"
        self.encoders = Encoders(
            fingerprints=dist.from_main(lambda: media_fingerprints(config)),
            settings=_settings(config),
            background=config.data.alpha_background,
        )
        self.video = VideoEncoder(config.video, seed=config.seed, device=device)
        self.audio = (
            None if config.audio is None else AudioEncoder(config.audio, seed=config.seed, device=device)
        )

    def entries(self, task: Task, loaded: Loaded) -> Iterator[Entry]:
        """Yields the latents of what was loaded.

        Raises:
            DataError: If a latent is not finite.
        """
        if LATENTS in loaded:
            latents_CFHW = self.video.encode(loaded[LATENTS])
            yield self._entry(task, LATENTS, latents_CFHW, _video_facts(task, latents_CFHW))
        if AUDIO_LATENTS in loaded:
            assert self.audio is not None, "sounds are loaded for an encoder"
            samples, rate_hz = loaded[AUDIO_LATENTS].shape[1], self.audio.form.sample_rate_hz
            latents = self.audio.encode(loaded[AUDIO_LATENTS])
            yield self._entry(task, AUDIO_LATENTS, latents, {"duration": repr(samples / rate_hz)})

    def _entry(self, task: Task, source: str, latents: Tensor, facts: Mapping[str, str]) -> Entry:
        metadata = {**self.encoders.identity(task, source), **facts}
        return Entry(source=source, tensors=_stored({"latents": latents}), metadata=metadata)


def media_fingerprints(config: EncodeConfig) -> dict[str, str]:
    """Returns the fingerprints of both VAEs by source."""
    found = {LATENTS: vae_fingerprint(config.video.model, seed=config.seed)}
    if config.audio is not None:
        found[AUDIO_LATENTS] = vae_fingerprint(config.audio.model, seed=config.seed)
    return found


def _settings(config: EncodeConfig) -> dict[str, str]:
    tiling = config.video.tiling
    tiles = "" if tiling is None else f" {tiling.tile.height}x{tiling.tile.width} {tiling.overlap}"
    chunks = "" if tiling is None or tiling.frames is None else f" {tiling.frames} {tiling.overlap_frames}"
    settings = {LATENTS: f"{config.video.precision}{tiles}{chunks}"}
    if config.audio is not None:
        loudness = "" if config.audio.loudness_lufs is None else f" {config.audio.loudness_lufs!r} LUFS"
        settings[AUDIO_LATENTS] = f"{config.audio.precision} {config.audio.missing_sound}{loudness}"
    return settings


def _video_facts(task: Task, latents_CFHW: Tensor) -> dict[str, str]:
    """Returns the sizes in latent units, as ltx-trainer has them, and what the media is, for buckets and
    held-out clips."""
    assert task.shape is not None, "clips have shapes"
    record = task.record
    numbers = {
        "num_frames": latents_CFHW.shape[1],
        "height": latents_CFHW.shape[2],
        "width": latents_CFHW.shape[3],
        "fps": clip_rate_hz(record, task.shape),
        "start_seconds": start_seconds(record, task.shape),
        "media_frames": record.frames,
        "media_fps": record.fps,
        "media_seconds": record.seconds,
        "media_height": record.height,
        "media_width": record.width,
    }
    return {name: repr(number) for name, number in numbers.items()}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns floating tensors in bf16: three digits, far below what a VAE loses; the range of fp32."""
    return {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
