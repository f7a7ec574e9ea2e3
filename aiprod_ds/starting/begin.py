"""`aiprod-ds init`: from a folder, a machine and a wish to files that check and fit.

Owns the order: look at the media, draft the phases, fit them to the machine, read the text back, write.
Called by the command line, which asks for what was not given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiprod_ds.config.load import load_config, load_encode_config
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.errors import ConfigError
from aiprod_ds.planner.hardware import MACHINES, machine_like
from aiprod_ds.starting.draft import CPU, Kind, PhaseDraft, Wish, phases_for
from aiprod_ds.starting.fit import fitted
from aiprod_ds.starting.look import Facts, look
from aiprod_ds.starting.write import Sound, Text, commands, tiny_model, tiny_sound


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What was made.

    Attributes:
        files: New configurations, the one of `encode` first.
        checked: The one that `check` is for now.
        options: Of that command.
        notes: What to know before training, in words.
        commands: What to type next, in order.
    """

    files: tuple[Path, ...]
    checked: Path
    options: tuple[str, ...]
    notes: tuple[str, ...]
    commands: Sequence[str]


def begin(wish: Wish, *, is_written_over: bool = False) -> Begun:
    """Writes the configuration that `wish` asks for.

    Raises:
        ConfigError: If a file is there already, or a model cannot be built.
        DataError: If the media cannot be listed.
        PlanError: If nothing fits the machine.
    """
    files = (wish.encode_file, wish.file) if wish.kind.is_diffusion else (wish.file,)
    there = [str(path) for path in files if path.exists() and not is_written_over]
    if there:
        raise ConfigError(f"{', '.join(there)}: must not exist, got a file. Name another, or add --force.")
    facts = look(Path(wish.data), wanted="sound" if wish.kind is Kind.AUDIO_VAE else "video")
    text = _text(wish, facts)
    contents = {wish.file: text.trainer()}
    if wish.kind.is_diffusion:
        contents[wish.encode_file] = text.encode()
    _read_back(wish, contents)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    is_for_gpus = wish.machine != CPU and not wish.kind.is_diffusion
    return Begun(
        files=files,
        checked=files[0],
        options=("--machine", wish.machine, "--gpus", str(wish.ranks)) if is_for_gpus else (),
        notes=(*text.notes, *_notes(text)),
        commands=commands(wish),
    )


def here() -> tuple[str, int]:
    """Returns the machine of this process, as the planner or `cpu` calls it, and its GPUs, or processes of a
    CPU."""
    import torch

    if not torch.cuda.is_available():
        return CPU, 2
    found = torch.cuda.get_device_properties(0)
    capability = (found.major, found.minor)
    like = machine_like(found.name, capability, memory_bytes=found.total_memory)
    speed = like.memory_bytes_per_second
    name = next(name for name, known in MACHINES.items() if known.memory_bytes_per_second == speed)
    return name, torch.cuda.device_count()


def _text(wish: Wish, facts: Facts) -> Text:
    from aiprod_ds.models.audio_vae import audio_facts, audio_strides  # loads torch and diffusers
    from aiprod_ds.models.registry import build_model
    from aiprod_ds.models.video_vae import video_strides

    vae = _vae(wish)
    shapes = build_model(vae, seed=0, device="meta")
    sound = None
    if wish.kind is Kind.AUDIO_VAE:
        strides, takes = audio_strides(shapes, vae), audio_facts(shapes, hop=vae.temporal_stride)
        sound = Sound(sample_rate_hz=takes.sample_rate_hz or 44_100, channels=takes.channels or 2)
        sound = tiny_sound() if wish.machine == CPU and wish.model is None else sound
        phases = phases_for(wish, facts, strides, sample_rate_hz=sound.sample_rate_hz)
    else:
        phases = phases_for(wish, facts, video_strides(shapes, vae))
    parts = partial(Text, wish=wish, facts=facts, sound=sound, has_vgg=_has_vgg())

    def trainer_text(phases: Sequence[PhaseDraft], settings: str) -> str:
        return parts(phases=tuple(phases), settings=settings).trainer()

    found = fitted(wish, phases, trainer_text)
    return parts(phases=found.phases, settings=found.settings, notes=found.notes)


def _vae(wish: Wish) -> ModelConfig:
    if wish.kind.is_diffusion:
        return ModelConfig(source="AutoencoderKLLTXVideo", pretrained=wish.model, subfolder="vae")
    source = "AutoencoderKLLTXVideo" if wish.kind is Kind.VIDEO_VAE else "AutoencoderOobleck"
    if wish.model is not None:
        return ModelConfig(source=source, pretrained=wish.model)
    return ModelConfig(**tiny_model(wish.kind)) if wish.machine == CPU else ModelConfig(source=source)


def _has_vgg() -> bool:
    from aiprod_ds.losses.vgg import WeightsUnavailableError, local_weights

    try:
        local_weights(None)
    except WeightsUnavailableError:
        return False
    return True


def _read_back(wish: Wish, contents: dict[Path, str]) -> None:
    """Loads what will be written: a fault here is one of this program."""
    with tempfile.TemporaryDirectory(prefix="aiprod_ds_init_") as folder:
        for path, content in contents.items():
            copy = Path(folder) / path.name
            copy.write_text(content, encoding="utf-8")
        load_config(Path(folder) / wish.file.name)
        if wish.kind.is_diffusion:
            load_encode_config(Path(folder) / wish.encode_file.name)


def _notes(text: Text) -> tuple[str, ...]:
    facts, wish, notes = text.facts, text.wish, []
    if facts.unusable:
        notes.append(f"{facts.unusable} files cannot be used: `aiprod-ds data {wish.data}` says why of each.")
    missing = facts.clips - facts.captioned
    if wish.kind.is_diffusion and missing:
        notes.append(
            f"{missing} of {facts.clips} clips have no caption and are trained with an empty one: write it "
            "into a text "
            "file beside each clip, and encode after that."
        )
    if wish.kind is Kind.VIDEO_VAE and not text.has_vgg:
        notes.append(
            "The perceptual loss is off, because VGG16's weights are not on this machine: pictures will be "
            "softer. "
            "loss.perceptual.weights names the file."
        )
    return tuple(notes)
