"""Previews from a user's own prompts: what is refused before training, what is kept, and what is shown."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from aiprod_ds.codec.decoders import LatentDecoder
from aiprod_ds.codec.encoders import AudioForm
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.sample import PreviewPrompt, TrainingPreviewConfig
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.engine import dist
from aiprod_ds.errors import ConfigError, PlanError
from aiprod_ds.metrics.evaluations import read_evaluations
from aiprod_ds.models import text
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.registry import find_family
from aiprod_ds.models.sampling import draw_noise, noise_levels, sample_latents
from aiprod_ds.report.summary import RunSummary
from aiprod_ds.testing.families import tiny_batch, tiny_transformer
from aiprod_ds.testing.runs import copy_as_if_stopped_at, without_plots
from aiprod_ds.trainers import preview_prompts
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.preview_prompts import (
    FILE,
    encode_prompts,
    prompt_item,
    prompt_problems,
    read_prompts,
)

TEXT = {
    "source": "T5EncoderModel",
    "config": {"vocab_size": 259, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "precision": "fp32",
    "max_tokens": 16,
}
SAMPLING = {"num_forwards": 2, "guidance_scale": 2.0, "decode_precision": "fp32", "text": TEXT}


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.initialize()
    with without_plots():
        yield
    dist.shutdown()


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "first.png"
    Image.new("RGB", (40, 20), (250, 10, 10)).save(path)
    return str(path)


def _trainer(folder: Path, *, family: Any = LTXVideo, updates: int = 4, **preview: Any) -> DiffusionTrainer:
    config = _config(folder, family=family, updates=updates, **preview)
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 3, 4, 4), "audio_latents": (2, 5, 4), "prompt_embeds": (3, 16)}
    clips: list[dict[str, Tensor]] = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(8)
    ]
    return DiffusionTrainer(config, source="test.yaml", dataset=clips[:6], validation=clips[6:])


def _config(
    folder: Path,
    *,
    family: Any = LTXVideo,
    updates: int = 4,
    audio_vae: dict[str, Any] | None = None,
    **preview: Any,
) -> DiffusionTrainerConfig:
    phase = {
        "name": "only",
        "resolution": "16x16",
        "duration": {"frames": 5},
        "learning_rate": 3e-3,
    }
    return DiffusionTrainerConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"source": family.transformer_class, "config": family.tiny_config()},
            "vae": {
                "source": "aiprod_ds.testing.tiny:TinyVideoVAE",
                "spatial_stride": 4,
                "temporal_stride": 2,
            },
            "audio_vae": audio_vae,
            "data": {"train": "given_in_code", "num_workers": 0},
            "curriculum": {"phases": [{**phase, "updates": updates, "global_batch_size": 2}]},
            "engine": {"kind": "local", "deepspeed_config": {}},
            "checkpoint": {"every_updates": 3},
            "evaluation": {"max_clips": 1, "num_pictures": 1, "noise_levels": [0.5]},
            "preview": {**SAMPLING, **preview},
        }
    )


def _prompts(picture: str) -> list[Any]:
    return [
        "a red cat",
        {
            "prompt": "a dog",
            "first_frame": picture,
            "resolution": "24x32",
            "duration": {"frames": 8, "frame_rate_hz": 4.0},
            "seed": 3,
        },
    ]


def _films(folder: Path, update: int) -> list[Any]:
    record = next(found for found in read_evaluations(folder) if found.update == update)
    return [medium for medium in record.media if medium.role == "preview"]


@pytest.mark.slow
def test_own_prompts_are_sampled_at_their_interval_and_encoded_once(
    tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    summary = _train(run, prompts=_prompts(picture), every_updates=2)
    plain = _train(tmp_path / "plain", text=None, guidance_scale=1.0)
    assert summary.final_state_sha256 == plain.final_state_sha256, "previews change nothing in training"
    records = read_evaluations(run)
    assert [(found.update, found.reason) for found in records] == [
        (0, "before"),
        (2, "interval"),
        (4, "phase_end"),
    ]
    assert records[1].metrics == {}, "its own interval: nothing was measured"
    films = _films(run, 2)
    assert [(film.clip, film.prompt) for film in films] == [(1, "a red cat"), (2, "a dog"), (3, "")]
    assert films[2].source == "validation[0]"
    with av.open(str(run / films[1].path)) as film:
        video = film.streams.video[0]
        shape = (video.height, video.width, video.frames, float(video.average_rate or 0))
    assert shape == (24 * 7, 32 * 7, 9, 4.0), "8 frames are rounded up to 9, 24 rows enlarged to 168"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the embeddings are in the run folder")

    monkeypatch.setattr(text, "build_text_encoder", refuse)
    copy = tmp_path / "copy"
    copy_as_if_stopped_at(3, run, copy)
    again = _trainer(copy, prompts=_prompts(picture), every_updates=2).train()
    assert (again.resumed_from, again.updates) == (("update_000003",), 4)
    with pytest.raises(AssertionError, match="the embeddings"):
        _trainer(copy, prompts=["another"]).train()


def _train(folder: Path, **preview: Any) -> RunSummary:
    return _trainer(folder, **preview).train()


@pytest.mark.slow
def test_a_clip_depends_on_its_prompt_its_place_and_its_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stills tell: an encoder of films may cut the same frames otherwise."""
    real, made = LatentDecoder.clip, list[bytes]()

    def clip(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        made.append(found.stills.tobytes())
        return found

    monkeypatch.setattr(LatentDecoder, "clip", clip)
    same = {"prompt": "a red cat", "seed": 5}
    _trainer(tmp_path / "one", prompts=["a red cat"], updates=1).train()
    one = made[-2:]
    _trainer(
        tmp_path / "two", prompts=["a red cat", "a red cat", same, {"prompt": "x", "seed": 5}], updates=1
    ).train()
    two = made[-5:]
    assert one[0] == two[0]
    assert one[-1] == two[-1], "held-out prompts have places of their own"
    assert len({*two}) == len(two)


@pytest.mark.slow
def test_compilation_has_room_for_the_shapes_of_own_prompts(tmp_path: Path, picture: str) -> None:
    """Two shapes, and of each the prompt's length and the empty one's."""
    trainer = _trainer(tmp_path, prompts=["x", "y", *_prompts(picture)])
    unit = trainer._prepare().build_unit(trainer.plan())
    assert unit.num_sampled_shapes() == 4
    plain = _trainer(tmp_path, text=None, guidance_scale=1.0)
    assert plain._prepare().build_unit(plain.plan()).num_sampled_shapes() == 0


@pytest.mark.slow
def test_what_was_encoded_stays_in_the_run_folder_in_bf16(tmp_path: Path, picture: str) -> None:
    _trainer(tmp_path / "run", prompts=_prompts(picture), updates=1).train()
    stored = load_file(tmp_path / "run" / FILE)
    kinds = sorted((name.partition(".")[2], str(tensor.dtype)) for name, tensor in stored.items())
    assert kinds == [
        ("first_frame", "torch.float32"),
        *[("prompt_attention_mask", "torch.bool")] * 3,
        *[("prompt_embeds", "torch.bfloat16")] * 3,
    ]


@pytest.mark.parametrize("family", [LTXVideo, LTX2])
def test_a_given_first_frame_stands_in_the_clip_and_changes_the_rest(family: Any) -> None:
    module = DiffusionModule(
        transformer := tiny_transformer(family),
        find_family(transformer, ModelStrides(spatial=32, temporal=8)),
    ).eval()
    batch = {name: tensor[:1] for name, tensor in tiny_batch(seed=0).items()}
    shapes = {"video": batch["latents"].shape[1:], "audio": batch["audio_latents"].shape[1:]}
    noise = draw_noise(
        {name: tuple(shapes[name]) for name in module.family.modalities}, {"video": 1, "audio": 2}
    )
    prompt = {name: tensor for name, tensor in batch.items() if "prompt" in name}
    seen: list[Tensor] = []

    def forward(noisy: Any, timesteps: Any, *rest: Any) -> Any:
        seen.append(timesteps["video"])
        return module(noisy, timesteps, *rest)

    def sample(first_frame: Tensor | None) -> dict[str, Tensor]:
        with torch.no_grad():
            return sample_latents(
                forward,
                module.family,
                noise=noise,
                fps=batch["fps"],
                prompt=prompt,
                empty_prompt=None,
                levels=noise_levels(2, shift=1.0),
                guidance_scale=1.0,
                first_frame=first_frame,
            )

    given = torch.full_like(noise["video"][:, :, :1], 0.5)
    free, held = sample(None), sample(given)
    assert torch.equal(held["video"][:, :, :1], given)
    assert not torch.equal(held["video"][:, :, 1:], free["video"][:, :, 1:])
    per_frame = noise["video"].shape[3] * noise["video"].shape[4]
    for level, levels in zip((1.0, 0.5), seen[2:], strict=True):
        assert levels[0, :per_frame].eq(0).all()
        assert levels[0, per_frame:].eq(level).all()


def test_a_given_sound_stays_and_is_seen_clean() -> None:
    transformer = tiny_transformer(LTX2)
    module = DiffusionModule(
        transformer, find_family(transformer, ModelStrides(spatial=32, temporal=8))
    ).eval()
    batch = {name: tensor[:1] for name, tensor in tiny_batch(seed=0).items()}
    shapes = {"video": tuple(batch["latents"].shape[1:]), "audio": tuple(batch["audio_latents"].shape[1:])}
    noise = draw_noise(shapes, {"video": 1, "audio": 2})
    seen: list[Any] = []

    def forward(noisy: Any, timesteps: Any, *rest: Any) -> Any:
        seen.append((noisy["audio"], timesteps))
        return module(noisy, timesteps, *rest)

    def sample(sound: Tensor | None) -> dict[str, Tensor]:
        with torch.no_grad():
            return sample_latents(
                forward,
                module.family,
                noise=noise,
                fps=batch["fps"],
                prompt={name: tensor for name, tensor in batch.items() if "prompt" in name},
                empty_prompt=None,
                levels=noise_levels(2, shift=1.0),
                guidance_scale=1.0,
                sound=sound,
            )

    free, held = sample(None), sample(batch["audio_latents"])
    assert torch.equal(held["audio"], batch["audio_latents"])
    assert not torch.equal(held["video"], free["video"])
    for level, (audio, timesteps) in zip((1.0, 0.5), seen[2:], strict=True):
        assert torch.equal(audio, seen[2][0])
        assert timesteps["audio"].eq(0).all()
        assert timesteps["video"].eq(level).all()


def test_a_sound_is_encoded_at_the_length_of_its_clip_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second of sound for a clip of a second: the rest is silence."""
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.full(8000, 8192, dtype=np.int16).tobytes())
    given: list[Tensor] = []

    class Encoder:
        form = AudioForm(sample_rate_hz=16000, channels=2, hop=640)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def encode(self, wave_CN: Tensor) -> Tensor:
            given.append(wave_CN)
            return torch.ones(2, wave_CN.shape[1] // 640, 4)

    monkeypatch.setattr(preview_prompts, "AudioEncoder", Encoder)
    prompt = {"prompt": "x", "sound": str(path), "duration": {"frames": 9, "frame_rate_hz": 9.0}}
    config = _config(tmp_path / "run", family=LTX2, prompts=[prompt], audio_vae={"source": "A"})
    transformer = tiny_transformer(LTX2)
    family = find_family(transformer, strides := ModelStrides(spatial=32, temporal=8))
    item = {
        "latents": torch.empty(4, 3, 4, 4),
        "audio_latents": torch.empty(2, 5, 4),
        "fps": torch.tensor(8.0),
    }
    bucket = _trainer(tmp_path / "plan", prompts=["x"]).plan().phases[0].buckets[0]
    (tmp_path / "run").mkdir()
    for start in range(2):
        found = encode_prompts(config, item, bucket, family=family, strides=strides)
        found.keep(tmp_path / "run")
        assert len(given) == 1, f"start {start}: encoded once, then known"
        (sound,) = found.sounds
        assert sound is not None
        length = round(family.sound.latents_per_second) if family.sound else 0
        assert sound.shape == (2, length, 4)
        made = prompt_item(config.preview.prompts[0], {}, item, bucket, family=family, strides=strides)
        assert made["audio_latents"].shape == sound.shape
    assert given[0].shape == (2, length * 640)
    assert given[0][:, :8000].eq(0.25).all()
    assert given[0][:, 8000:].eq(0).all()


def test_a_sound_that_cannot_be_had_is_refused_with_its_place(tmp_path: Path, picture: str) -> None:
    with pytest.raises(PlanError, match=r"prompts\[0\]\.sound: has no effect for the family 'ltx'"):
        _trainer(tmp_path / "run", prompts=[{"prompt": "x", "sound": picture}]).plan()
    strides = ModelStrides(spatial=32, temporal=8)
    family = find_family(tiny_transformer(LTX2), strides)
    bucket = _trainer(tmp_path / "plan", prompts=["x"]).plan().phases[0].buckets[0]
    for path in (picture, "no.wav"):
        entry = PreviewPrompt(prompt="x", sound=path)
        (problem,) = prompt_problems([entry], bucket, family=family, strides=strides)
        assert problem.startswith(f"preview.prompts[0].sound: must be a file with sound, got {path!r}")


def test_prompts_come_from_a_file_too(tmp_path: Path) -> None:
    lines, entries = tmp_path / "prompts.txt", tmp_path / "prompts.yaml"
    lines.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    entries.write_text("- a bird\n- {prompt: a fish, seed: 4}\n", encoding="utf-8")
    for path, expected in (
        (lines, [("own", None), ("a cat", None), ("a dog", None)]),
        (entries, [("own", None), ("a bird", None), ("a fish", 4)]),
    ):
        config = TrainingPreviewConfig.model_validate(
            {"text": TEXT, "prompts": ["own"], "prompts_file": str(path)}
        )
        assert [(entry.prompt, entry.seed) for entry in read_prompts(config)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "missing.txt",
            None,
            r"preview\.prompts_file: must be a text or YAML file of prompts, got .*missing",
        ),
        ("empty.txt", "\n", r"preview\.prompts_file: must hold a prompt, got none"),
        ("wrong.yaml", "- {promt: x}\n", r"wrong\.yaml: 0\.prompt: .*required"),
        ("wrong.yaml", "a: 1\n", r"wrong\.yaml: : .*list"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    trainer = _trainer(tmp_path / "run", prompts_file=str(tmp_path / name))
    with pytest.raises(ConfigError, match=message):
        trainer.plan()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"first_frame": "no.png"}, r"prompts\[0\]\.first_frame: must be a picture, got 'no\.png'"),
        ({"resolution": "16x18"}, r"prompts\[0\]\.resolution: must be a multiple of 4x4 .*, got 16x18"),
        (
            {"first_frame": "PICTURE", "duration": {"frames": 1}},
            r"prompts\[0\]\.first_frame: needs a clip of more than one latent frame",
        ),
    ],
)
def test_a_prompt_that_cannot_be_sampled_is_refused_with_its_place(
    tmp_path: Path, picture: str, entry: dict[str, Any], message: str
) -> None:
    own = {key: picture if value == "PICTURE" else value for key, value in entry.items()}
    with pytest.raises(PlanError, match=message):
        _trainer(tmp_path / "run", prompts=[{"prompt": "x", **own}]).plan()


def test_a_family_with_one_noise_level_takes_no_first_frame(
    tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LTXVideo, "has_token_timesteps", False)
    prompts = [{"prompt": "x", "first_frame": picture}]
    with pytest.raises(PlanError, match=r"first_frame: has no effect for the family 'ltx'"):
        _trainer(tmp_path / "run", prompts=prompts).plan()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": ["x"]}, "text: must be given for own prompts"),
        ({"text": TEXT}, "text: has no effect without prompts"),
        ({"every_updates": 0}, "every_updates: must be >= 1, got 0"),
        ({"prompts": [{"prompt": ""}], "text": TEXT}, r"prompts\[0\]\.prompt: must not be empty"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingPreviewConfig.model_validate(values)


def test_an_interval_without_anything_to_preview_is_refused(tmp_path: Path) -> None:
    config = _trainer(tmp_path, text=None, guidance_scale=1.0).config.model_dump(mode="json")
    config["evaluation"]["num_pictures"] = 0
    config["preview"]["every_updates"] = 5
    with pytest.raises(ConfigError, match=r"preview\.every_updates: has no effect without previews"):
        DiffusionTrainerConfig.model_validate(config)
