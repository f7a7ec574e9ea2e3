"""Samples clips from an exported diffusion model: `run_sampling` is what `aiprod-ds sample` calls, on one
process.

Owns the loading of a whole model and the files that are written; the mathematics is in `models.sampling`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from aiprod_ds.bad_disk import disk_required
from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.codec.encoders import DTYPES
from aiprod_ds.config.sample import SampleConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine.dist import choose_device
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import replacing, write_atomically, write_lines_atomically
from aiprod_ds.media.clips import Clip, save_contact_sheet
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.registry import build_model
from aiprod_ds.models.sampling import draw_noise, noise_levels, sample_latents
from aiprod_ds.models.text import build_text_encoder
from aiprod_ds.models.video_vae import video_strides
from aiprod_ds.rng import stream_seed

CONTACT_SHEET, RECORD = "samples.png", "samples.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What was written.

    Attributes:
        clips: One MP4 for each prompt, in order.
        contact_sheet: Some frames of every clip.
        record: JSON: seed, shape, settings, and the prompt of every clip.
    """

    clips: tuple[Path, ...]
    contact_sheet: Path
    record: Path


def run_sampling(
    config: SampleConfig, *, source: str = "configuration", console: Console | None = None
) -> Samples:
    """Writes one clip for each prompt (`01.mp4` and so on), a contact sheet and a record into the output
    folder.

    The noise of a clip depends on the seed and the number of its prompt alone.

    Args:
        config: What to sample.
        source: How messages name the configuration.
        console: Where a progress bar is drawn; None draws none.

    Raises:
        ConfigError: If a model cannot be built, or the models or the shape do not go together.
        CheckpointError: If the adapter does not fit the transformer.
        DataError: If a prompt is too long, or embeddings or latents do not fit the transformer.
        EngineError: If the device has too little memory for decoding.
    """
    device = choose_device()
    strides, family = _planned(config, source)
    prompts = _embeddings(config, device)
    decoder = LatentDecoder(config.vae, config.audio_vae, config.sampling, seed=config.seed)
    for replacement in decoder.replacements():
        _LOG.info("%s", replacement)
    frames = strides.snap(config.requested_frames)
    sampler = _Sampler(config, family, _latent_shapes(config, decoder, frames), device)
    output = Path(config.output_dir)
    with disk_required(output):
        output.mkdir(parents=True, exist_ok=True)
    clips: list[Clip] = []
    paths: list[Path] = []
    for number in track(
        range(1, len(config.prompts) + 1), "sampling", console=console, disable=console is None
    ):
        latents = sampler.latents(number, prompts[number - 1], prompts[-1])
        clips.append(decoder.clip(latents, frame_rate_hz=config.frame_rate_hz, device=device))
        paths.append(output / f"{number:02d}.mp4")
        with disk_required(paths[-1]):
            write_lines_atomically(paths[-1], (clips[-1].mp4,))
    samples = Samples(clips=tuple(paths), contact_sheet=output / CONTACT_SHEET, record=output / RECORD)
    title = f"{frames} frames {config.resolution.height}x{config.resolution.width}, seed {config.seed}"
    record = json.dumps(_record(config, frames, paths), indent=1, ensure_ascii=False)
    with disk_required(output):
        with replacing(samples.contact_sheet) as temporary:
            save_contact_sheet(clips, config.prompts, temporary, title=title)
        write_atomically(samples.record, record + "\n")
    return samples


def check_sampling(config: SampleConfig, *, source: str = "configuration") -> str:
    """Checks what `run_sampling` would find before it reads weights, and writes nothing.

    Returns:
        What would be made, in words.

    Raises:
        ConfigError: If a model cannot be built, or the models or the shape do not go together.
    """
    strides, _ = _planned(config, source)
    size = f"{config.resolution.height}x{config.resolution.width}"
    return (
        f"{len(config.prompts)} clips of {strides.snap(config.requested_frames)} frames {size} for "
        f"{config.output_dir}"
    )


class _Sampler:
    """A transformer on the device, with its adapter, for clips of one shape."""

    def __init__(
        self,
        config: SampleConfig,
        family: Family,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        transformer = build_model(config.model, seed=config.seed)
        if config.lora is not None:
            from aiprod_ds.models.lora import load_lora  # imports peft, which takes seconds

            load_lora(transformer, Path(config.lora), allowed=family.lora_targets)
        self._module = (
            DiffusionModule(transformer, family)
            .eval()
            .requires_grad_(False)
            .to(device, DTYPES[config.precision])
        )
        self._config = config
        self._family = family
        self._shapes = shapes
        self._device = device

    @torch.inference_mode()
    def latents(
        self, number: int, prompt: Mapping[str, Tensor], empty_prompt: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns normalised latents [C,...] by modality of one clip."""
        settings = self._config.sampling
        seeds = {
            modality: stream_seed(self._config.seed, "sample", number, modality) for modality in self._shapes
        }
        latents = sample_latents(
            self._module,
            self._family,
            noise={
                modality: value.to(self._device)
                for modality, value in draw_noise(self._shapes, seeds).items()
            },
            fps=torch.tensor([self._config.frame_rate_hz], device=self._device),
            prompt=prompt,
            empty_prompt=empty_prompt if settings.guidance_scale > 1 else None,
            levels=noise_levels(settings.num_forwards, shift=settings.time_shift),
            guidance_scale=settings.guidance_scale,
        )
        return {modality: value[0] for modality, value in latents.items()}


def _planned(config: SampleConfig, source: str) -> tuple[ModelStrides, Family]:
    """Checks what can be checked without weights."""
    strides = video_strides(build_model(config.vae, seed=config.seed, device="meta"), config.vae)
    family = find_family(build_model(config.model, seed=config.seed, device="meta"), strides)
    problems = [f"{source}: {problem}" for problem in _problems(config, strides, family)]
    if problems:
        raise ConfigError(problems)
    return strides, family


def _problems(config: SampleConfig, strides: ModelStrides, family: Family) -> Iterator[str]:
    height, width = config.resolution.height, config.resolution.width
    if height % strides.spatial or width % strides.spatial:
        yield (
            f"resolution: must be a multiple of the VAE's stride {strides.spatial} both ways, got "
            f"{height}x{width}. Change it."
        )
    if family.sound is not None and config.audio_vae is None:
        yield (
            f"audio_vae: must be given for the family {family.name!r}, which makes sound, got nothing. Name "
            "its VAE."
        )
    if family.sound is None and config.audio_vae is not None:
        yield (
            f"audio_vae: has no effect for the family {family.name!r}, which makes no sound, got a value. "
            "Remove it."
        )
    if config.sampling.vocoder is not None and config.audio_vae is None:
        yield "sampling.vocoder: has no effect without audio_vae, got a value. Remove it."


def _embeddings(config: SampleConfig, device: torch.device) -> list[dict[str, Tensor]]:
    """Returns the tensors of every prompt and, last, of the empty one, each with the axis B; the encoder is
    gone afterwards."""
    encoder = build_text_encoder(config.text, seed=config.seed).to(device)
    embeds = [encoder.encode([text]).tensors(0) for text in (*config.prompts, config.empty_prompt)]
    return [{name: tensor[None].to(device) for name, tensor in tensors.items()} for tensors in embeds]


def _latent_shapes(config: SampleConfig, decoder: LatentDecoder, frames: int) -> dict[str, tuple[int, ...]]:
    height, width = config.resolution.height, config.resolution.width
    shapes = {"video": decoder.video.latent_shape(frames=frames, height=height, width=width)}
    if decoder.audio is not None:
        shapes["audio"] = decoder.audio.latent_shape(frames / config.frame_rate_hz)
    return shapes


def _record(config: SampleConfig, frames: int, paths: Sequence[Path]) -> dict[str, object]:
    return {
        "samples": [
            {"file": path.name, "prompt": prompt} for path, prompt in zip(paths, config.prompts, strict=True)
        ],
        "seed": config.seed,
        "shape": {
            "frames": frames,
            "height": config.resolution.height,
            "width": config.resolution.width,
            "frame_rate_hz": config.frame_rate_hz,
        },
        "empty_prompt": config.empty_prompt,
        "sampling": config.sampling.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "lora": config.lora,
        "precision": config.precision,
    }
