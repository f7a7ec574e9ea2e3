"""A user's own prompts for previews: read and checked before training, encoded once, and kept in the run
folder.

Owns the list, the text encoder's short life and the latents of first frames and sounds; how clips are sampled
is `preview.py`. Called by the diffusion trainer when it plans, and by its unit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_ds.codec.encoders import AudioEncoder, VideoEncoder
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.encode import AudioEncoderConfig, VideoEncoderConfig
from aiprod_ds.config.sample import PreviewPrompt, TrainingPreviewConfig
from aiprod_ds.curriculum.phase import BucketPlan
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.decode.audio import decode_beginning
from aiprod_ds.decode.sound_file import SoundFile
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError
from aiprod_ds.files import file_sha256, read_whole, replacing
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.strict_yaml import read_yaml

_LOG = logging.getLogger(__name__)
FILE = "preview_prompts.safetensors"
_EMPTY, _FIRST_FRAME, _SOUND = "", "first_frame", "sound"
_PROMPTS: TypeAdapter[list[PreviewPrompt]] = TypeAdapter(list[PreviewPrompt])


def read_prompts(config: TrainingPreviewConfig) -> tuple[PreviewPrompt, ...]:
    """Returns the prompts of the configuration and those of its file.

    Raises:
        ConfigError: If the file cannot be read or an entry is no prompt.
    """
    if config.prompts_file is None:
        return config.prompts
    path = Path(config.prompts_file)
    try:
        data = read_whole(path)
        if path.suffix in {".yaml", ".yml"}:
            found = _PROMPTS.validate_python(read_yaml(data, str(path)))
        else:
            lines = (line.strip() for line in data.decode("utf-8").splitlines())
            found = [PreviewPrompt(prompt=line) for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"preview.prompts_file: must be a text or YAML file of prompts, got {config.prompts_file!r} "
            f"({error}). Correct the path; it is relative to the working folder."
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"{path}: {place}: {problem['msg']}, got {problem['input']!r}. Write a list of prompts, as "
            "preview.prompts has it."
        ) from error
    if not found:
        raise ConfigError(f"preview.prompts_file: must hold a prompt, got none in {path}. Add one.")
    return (*config.prompts, *found)


def prompt_problems(
    prompts: Sequence[PreviewPrompt], bucket: BucketPlan, *, family: Family, strides: ModelStrides
) -> Iterator[str]:
    """Yields what cannot be sampled, as `dotted.path: rule, got X. Fix.`

    Args:
        bucket: Whose shape prompts have that state none.
    """
    for index, entry in enumerate(prompts):
        where = f"preview.prompts[{index}]"
        if (size := entry.resolution) is not None:
            rows, columns = (strides.spatial * patch for patch in family.patch[1:])
            if size.height % rows or size.width % columns:
                yield (
                    f"{where}.resolution: must be a multiple of {rows}x{columns} for this VAE and model, got "
                    f"{size.height}x{size.width}. Change it."
                )
        duration, rate_hz = entry.duration, bucket.frame_rate_hz
        if duration is not None and duration.seconds and not (duration.frame_rate_hz or rate_hz):
            yield (
                f"{where}.duration.frame_rate_hz: must be given with seconds, because the last phase has no "
                "rate of its own, got nothing. Add it."
            )
        elif entry.first_frame is not None:
            yield from _first_frame_problems(f"{where}.first_frame", entry, bucket, family, strides)
        if entry.sound is not None:
            yield from _sound_problems(f"{where}.sound", entry.sound, family)


def prompt_bucket(entry: PreviewPrompt, bucket: BucketPlan, *, strides: ModelStrides) -> BucketPlan:
    """Returns the shape of the prompt's clip; `bucket` is that of prompts which state none."""
    own = entry.duration
    rate_hz = bucket.frame_rate_hz if own is None or own.frame_rate_hz is None else own.frame_rate_hz
    frames = _frames(entry, bucket, strides, rate_hz)
    height, width = (
        (bucket.height, bucket.width)
        if entry.resolution is None
        else (entry.resolution.height, entry.resolution.width)
    )
    return replace(bucket, frames=frames, height=height, width=width, frame_rate_hz=rate_hz)


def _first_frame_problems(
    where: str, entry: PreviewPrompt, bucket: BucketPlan, family: Family, strides: ModelStrides
) -> Iterator[str]:
    if not family.has_token_timesteps or family.patch[0] != 1:
        yield (
            f"{where}: has no effect for the family {family.name!r}, whose transformer takes one noise level "
            f"per sample, got {entry.first_frame!r}. Remove it."
        )
    if strides.latents(_frames(entry, bucket, strides, bucket.frame_rate_hz)) == 1:
        yield f"{where}: needs a clip of more than one latent frame, got {entry.first_frame!r}. Lengthen it."
    try:
        with Image.open(entry.first_frame or "") as picture:
            picture.verify()
    except (OSError, SyntaxError) as error:
        yield (
            f"{where}: must be a picture, got {entry.first_frame!r} ({error}). Correct the path; it is "
            "relative to the working folder."
        )


def _sound_problems(where: str, path: str, family: Family) -> Iterator[str]:
    if family.sound is None:
        yield (
            f"{where}: has no effect for the family {family.name!r}, which makes no sound, got {path!r}. "
            "Remove it."
        )
        return
    try:
        with SoundFile(Path(path)):
            pass
    except (av.FFmpegError, OSError, ValueError) as error:
        yield (
            f"{where}: must be a file with sound, got {path!r} ({error}). Correct the path; it is relative "
            "to the working folder."
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedPrompts:
    """Own prompts as the transformer takes them.

    Attributes:
        entries: As configured.
        conditions: Tensors of each prompt.
        empty: Of the empty prompt, by the same encoder; None without prompts.
        first_frames: Normalised latents [C,1,H',W'] of each prompt's picture; None where there is none.
        sounds: Normalised latents of each prompt's sound, as long as its clip; None where there is none.
    """

    entries: tuple[PreviewPrompt, ...] = ()
    conditions: tuple[Mapping[str, Tensor], ...] = ()
    empty: Mapping[str, Tensor] | None = None
    first_frames: tuple[Tensor | None, ...] = ()
    sounds: tuple[Tensor | None, ...] = ()
    _stored: Mapping[str, Tensor]

    def keep(self, folder: Path) -> None:
        """Writes what was encoded into the run folder unless it is there, so that a resumed run loads no
        encoder."""
        path = folder / FILE
        if not self._stored or set(_known(folder)) >= set(self._stored):
            return
        try:
            with replacing(path) as temporary:
                save_file(dict(self._stored), temporary)
        except (OSError, SafetensorError) as error:
            _LOG.warning("prompts_not_kept file=%s error=%s; a resume encodes them again", path, error)


def encode_prompts(
    config: DiffusionTrainerConfig,
    item: Mapping[str, Tensor],
    bucket: BucketPlan,
    *,
    family: Family,
    strides: ModelStrides,
) -> EncodedPrompts:
    """Returns the prompts of a run, from its folder if an earlier start has encoded them. Collective.

    The main rank encodes, on its device, while no engine has taken the memory; encoders are gone afterwards.

    Args:
        item: A held-out item; its shape is that of prompts which state none.
        bucket: The last phase's first.

    Raises:
        ConfigError: If an encoder cannot be built or a file cannot be read.
        DataError: If a prompt is too long.
    """
    entries = read_prompts(config.preview)
    if not entries:
        return EncodedPrompts(_stored={})
    sizes = [_size(entry, item, strides) for entry in entries]
    lengths = [_sound_length(entry, item, bucket, family, strides) for entry in entries]
    stored = dist.broadcast_object(
        dist.together(lambda: _encoded(config, entries, sizes, lengths) if dist.is_main() else {})
    )
    digests = [_text_digest(config, entry.prompt) for entry in entries]
    frames = [_frame_digest(config, entry, size) for entry, size in zip(entries, sizes, strict=True)]
    sounds = [_sound_digest(config, entry, length) for entry, length in zip(entries, lengths, strict=True)]
    return EncodedPrompts(
        entries=entries,
        conditions=tuple(_of(stored, digest) for digest in digests),
        empty=_of(stored, _text_digest(config, _EMPTY)),
        first_frames=tuple(
            None if digest is None else _of(stored, digest)[_FIRST_FRAME] for digest in frames
        ),
        sounds=tuple(None if digest is None else _of(stored, digest)[_SOUND] for digest in sounds),
        _stored=stored,
    )


def prompt_item(
    entry: PreviewPrompt,
    conditions: Mapping[str, Tensor],
    item: Mapping[str, Tensor],
    bucket: BucketPlan,
    *,
    family: Family,
    strides: ModelStrides,
) -> dict[str, Tensor]:
    """Returns what a dataset of latents would give for the prompt; the latents only say the shape.

    Args:
        item: A held-out item: its shape and rate are those of prompts which state none.
    """
    own, rate_hz = entry.duration, _rate_hz(entry, item, bucket)
    height, width = _size(entry, item, strides)
    channels, num_latents = item["latents"].shape[:2]
    made = {"fps": torch.tensor(rate_hz), **conditions}
    frames = _frames(entry, bucket, strides, rate_hz)
    if own is not None:
        num_latents = strides.latents(frames)
    made["latents"] = torch.empty(channels, num_latents, height // strides.spatial, width // strides.spatial)
    if family.sound is not None:
        sound, length = item["audio_latents"], _sound_length(entry, item, bucket, family, strides)
        made["audio_latents"] = torch.empty(sound.shape[0], length, *sound.shape[2:])
    return made


def _encoded(
    config: DiffusionTrainerConfig,
    entries: Sequence[PreviewPrompt],
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
) -> dict[str, Tensor]:
    """Returns the tensors of all prompts, pictures and sounds by digest and name, those that are known from
    the run folder."""
    stored, wanted = _known(Path(config.output_dir)), dict[str, Tensor]()
    device = dist.choose_device()
    missing: list[str] = []
    for text in dict.fromkeys((*(entry.prompt for entry in entries), _EMPTY)):
        found = _of(stored, digest := _text_digest(config, text))
        wanted |= {f"{digest}.{name}": tensor for name, tensor in found.items()}
        missing += [] if found else [text]
    if missing:
        wanted |= _encoded_texts(config, missing, device)
    wanted |= _encoded_sounds(config, entries, lengths, stored, device)
    video: VideoEncoder | None = None
    for entry, size in zip(entries, sizes, strict=True):
        digest_or_none = _frame_digest(config, entry, size)
        if digest_or_none is None:
            continue
        key = f"{digest_or_none}.{_FIRST_FRAME}"
        if key not in stored and video is None:
            encoder = VideoEncoderConfig(model=config.vae, precision=config.preview.decode_precision)
            video = VideoEncoder(encoder, seed=config.seed, device=device)
        if key in stored:
            wanted[key] = stored[key]
        elif video is not None:
            wanted[key] = video.encode(_picture(entry.first_frame or "", size)).clone()
    return wanted


def _encoded_sounds(
    config: DiffusionTrainerConfig,
    entries: Sequence[PreviewPrompt],
    lengths: Sequence[int],
    stored: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    audio: AudioEncoder | None = None
    for entry, length in zip(entries, lengths, strict=True):
        digest = _sound_digest(config, entry, length)
        if digest is None or entry.sound is None:
            continue
        key = f"{digest}.{_SOUND}"
        if key in stored:
            made[key] = stored[key]
            continue
        if audio is None:
            assert config.audio_vae is not None, "families with sound have one"
            encoder = AudioEncoderConfig(model=config.audio_vae, precision=config.preview.decode_precision)
            audio = AudioEncoder(encoder, seed=config.seed, device=device)
        form = audio.form
        wave_CN = decode_beginning(
            Path(entry.sound),
            num_samples=length * form.hop,
            sample_rate_hz=form.sample_rate_hz,
            channels=form.channels,
        )
        made[key] = audio.encode(wave_CN).clone()
    return made


def _encoded_texts(
    config: DiffusionTrainerConfig, texts: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    from aiprod_ds.models.text import build_text_encoder  # imports transformers, which takes seconds

    assert config.preview.text is not None, "the schema demands it"
    _LOG.info("preview_prompts_encoded number=%d", len(texts))
    encoder = build_text_encoder(config.preview.text, seed=config.seed).to(device)
    made: dict[str, Tensor] = {}
    for text in texts:
        digest = _text_digest(config, text)
        for name, tensor in encoder.encode([text]).tensors(0).items():
            # In bf16, as `aiprod-ds encode` keeps the captions that are trained on.
            made[f"{digest}.{name}"] = tensor.bfloat16() if tensor.is_floating_point() else tensor.clone()
    return made


def _known(folder: Path) -> dict[str, Tensor]:
    """Returns what an earlier start has encoded; a file that cannot be read is made anew."""
    try:
        return load_file(folder / FILE)
    except (OSError, SafetensorError):
        return {}


def _of(stored: Mapping[str, Tensor], digest: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{digest}."): tensor
        for name, tensor in stored.items()
        if name.startswith(f"{digest}.")
    }


def _text_digest(config: DiffusionTrainerConfig, text: str) -> str:
    assert config.preview.text is not None, "the schema demands it"
    return _digest([config.preview.text.model_dump(mode="json"), config.seed, text])


def _frame_digest(config: DiffusionTrainerConfig, entry: PreviewPrompt, size: tuple[int, int]) -> str | None:
    if entry.first_frame is None:
        return None
    picture, vae = file_sha256(Path(entry.first_frame)), config.vae.model_dump(mode="json")
    return _digest([picture, vae, config.seed, config.preview.decode_precision, size])


def _sound_digest(config: DiffusionTrainerConfig, entry: PreviewPrompt, length: int) -> str | None:
    if entry.sound is None or config.audio_vae is None:
        return None
    sound, vae = file_sha256(Path(entry.sound)), config.audio_vae.model_dump(mode="json")
    return _digest([sound, vae, config.seed, config.preview.decode_precision, length])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _picture(path: str, size: tuple[int, int]) -> Tensor:
    """Returns [3,1,H,W] in [-1,1]: the middle of the picture in the size's shape, scaled to it."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = size
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    pixels_HWC = torch.from_numpy(np.array(fitted))
    return pixels_HWC.permute(2, 0, 1)[:, None].float() / 127.5 - 1.0


def _size(entry: PreviewPrompt, item: Mapping[str, Tensor], strides: ModelStrides) -> tuple[int, int]:
    if entry.resolution is not None:
        return entry.resolution.height, entry.resolution.width
    height, width = item["latents"].shape[2:]
    return height * strides.spatial, width * strides.spatial


def _rate_hz(entry: PreviewPrompt, item: Mapping[str, Tensor], bucket: BucketPlan) -> float:
    own = entry.duration
    if own is not None and own.frame_rate_hz is not None:
        return own.frame_rate_hz
    return bucket.frame_rate_hz or float(item["fps"])


def _sound_length(
    entry: PreviewPrompt,
    item: Mapping[str, Tensor],
    bucket: BucketPlan,
    family: Family,
    strides: ModelStrides,
) -> int:
    """Returns the audio latents of the prompt's clip; 0 for a family without sound."""
    if family.sound is None:
        return 0
    if entry.duration is None:
        return item["audio_latents"].shape[1]
    rate_hz = _rate_hz(entry, item, bucket)
    seconds = _frames(entry, bucket, strides, rate_hz) / rate_hz
    return max(1, round(seconds * family.sound.latents_per_second))


def _frames(entry: PreviewPrompt, bucket: BucketPlan, strides: ModelStrides, rate_hz: float | None) -> int:
    own = entry.duration
    if own is None:
        return bucket.frames
    if own.frames is not None:
        return strides.snap(own.frames)
    return strides.snap(max(1, round((own.seconds or 0.0) * (own.frame_rate_hz or rate_hz or 0.0))))
