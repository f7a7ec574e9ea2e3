"""Runs on sounds, on latents and on datasets of one's own are refused on other data than they had, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.diffusion import DiffusionTrainerConfig
from aiprod_ds.config.video_vae import VAETrainerConfig
from aiprod_ds.data.latents import CONDITIONS, EMPTY_PROMPT, LATENTS, LatentShape, entry_path, write_entry
from aiprod_ds.errors import ConfigError
from aiprod_ds.media.sounds import save_wav
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.report.summary import RunSummary
from aiprod_ds.testing.runs import without_plots
from aiprod_ds.testing.tiny import TinyVideoVAE, tiny_oobleck
from aiprod_ds.trainers.audio_vae import AudioVAETrainer
from aiprod_ds.trainers.base import Trainer
from aiprod_ds.trainers.diffusion import DiffusionTrainer
from aiprod_ds.trainers.video_vae import VideoVAETrainer

pytestmark = pytest.mark.slow

STOPPED, LAST, RATE_HZ = 2, 4, 8_000
SHAPE = LatentShape(frames=9, height=64, width=64)
VAE = {"source": "aiprod_ds.testing.tiny:TinyVideoVAE", "spatial_stride": 32, "temporal_stride": 8}


@pytest.fixture(autouse=True)
def _quick_reports() -> Iterator[None]:
    with without_plots():
        yield


def _refused_then_accepted(new: Callable[[], Trainer[Any]], change: Callable[[], None], words: str) -> None:
    """Trains, changes the data, and checks that the run goes on only knowingly."""
    folder = Path(new().config.output_dir)
    for _ in range(2):
        assert new().train().accepted_data == (), "the same data is no change"
        shutil.rmtree(folder / "checkpoints" / f"update_{LAST:06d}")
    change()
    with pytest.raises(ConfigError) as refusal:
        new().train()
    assert words in str(refusal.value)
    summary: RunSummary = new().train(accept_changed_data=True)
    (said,) = summary.accepted_data
    assert said.startswith(f"update_{STOPPED:06d}: {words}")
    assert json.loads((folder / "report.json").read_text())["accepted_data"] == [said]
    assert new().train().accepted_data == (said,), "it is the run's data now"


def _values(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "engine": {"kind": "local", "deepspeed_config": {"zero_optimization": {"stage": 1}}},
        "checkpoint": {"every_updates": STOPPED},
        "evaluation": {"max_clips": 1, "num_pictures": 0},
        **sections,
    }


def _phase(**shape: Any) -> dict[str, Any]:
    phase = {"name": "only", "updates": LAST, "learning_rate": 1e-3, "global_batch_size": 2}
    return {"phases": [{**phase, **shape}]}


def test_sounds(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("held_out", 2)):
        (tmp_path / part).mkdir()
        for number in range(count):
            _save_sound(tmp_path / part / f"{number}.wav", 0.05 + 0.01 * number)
    config = AudioVAETrainerConfig.model_validate(
        _values(
            tmp_path,
            model={
                "source": "AutoencoderOobleck",
                "config": {**tiny_oobleck(), "audio_channels": 1, "sampling_rate": RATE_HZ},
            },
            data={
                "train": str(tmp_path / "train"),
                "validation": str(tmp_path / "held_out"),
                "num_workers": 0,
                "sample_rate_hz": RATE_HZ,
                "channels": 1,
            },
            loss={"spectral": {"fft_sizes": [256, 64]}},
            curriculum=_phase(duration={"frames": 1_200}),
        )
    )
    _refused_then_accepted(
        lambda: AudioVAETrainer(config),
        lambda: _save_sound(tmp_path / "held_out" / "1.wav", 0.5),
        "held out: 1 altered (1.wav: another content)",
    )


def _save_sound(path: Path, pitch: float) -> None:
    save_wav(0.2 * torch.sin(torch.arange(2_400) * pitch)[None], path, sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize("moves", [False, True])
def test_latents(tmp_path: Path, moves: bool) -> None:
    """Encoded anew with the same shapes: the files have the sizes that they had."""
    root = tmp_path / "latents_of_clips"
    for number in range(5):
        _save_latents(root, f"{number}.mp4", seed=number)
    write_entry(root / EMPTY_PROMPT, _prompt(seed=9), {})

    def new() -> Trainer[Any]:
        data = {"train": str(root), "num_workers": 0, "holdout_fraction": 0.2}
        values = _values(
            tmp_path,
            model={"source": LTXVideo.transformer_class, "config": LTXVideo.tiny_config()},
            vae=VAE,
            data=data,
            curriculum=_phase(resolution="64x64", duration={"frames": SHAPE.frames}),
            evaluation={"max_clips": 1, "num_pictures": 0, "noise_levels": [0.5]},
        )
        return DiffusionTrainer(DiffusionTrainerConfig.model_validate(values))

    def change() -> None:
        nonlocal root
        if moves:
            root = root.rename(tmp_path / "elsewhere")
        write_entry(root / EMPTY_PROMPT, _prompt(seed=10), {})

    _refused_then_accepted(new, change, f"beside the clips: 1 altered ({EMPTY_PROMPT}: another content)")
    _save_latents(root, "3.mp4", seed=30)
    with pytest.raises(
        ConfigError, match=r"(training|held out): 1 altered \(3\.mp4: another content\)\. Rest"
    ):
        new().train()


def _save_latents(root: Path, clip: str, *, seed: int) -> None:
    facts = {"media_sha256": f"sha of {clip}", "fps": "24.0", "media_fps": "24.0", "media_frames": "9"}
    facts |= {"media_seconds": "0.375", "media_height": "64", "media_width": "64"}
    latents = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    write_entry(entry_path(root, LATENTS, f"{clip}@{SHAPE.tag}"), {"latents": latents}, facts)
    write_entry(entry_path(root, CONDITIONS, clip), _prompt(seed=seed), {})


def _prompt(*, seed: int) -> dict[str, Tensor]:
    embeds = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(3)}


class Own(list[Tensor]):
    """A dataset that can say what it holds."""

    fingerprint = "edition 1"


@pytest.mark.parametrize("says", [False, True])
def test_own_datasets(tmp_path: Path, says: bool) -> None:
    clips = Own(2 * torch.rand(3, 5, 16, 16) - 1 for _ in range(4))
    config = VAETrainerConfig.model_validate(
        _values(
            tmp_path,
            model={"source": "given_in_code", "spatial_stride": 4, "temporal_stride": 2},
            data={"train": "unused", "num_workers": 0},
            loss={"perceptual_weight": 0.0},
            curriculum=_phase(resolution="16x16", duration={"frames": 5}),
        )
    )

    def new() -> Trainer[Any]:
        torch.manual_seed(0)
        return VideoVAETrainer(config, model=TinyVideoVAE(), dataset=clips, validation=clips[:1])

    def change() -> None:
        if says:
            clips.fingerprint = "edition 2"
        else:
            clips.append(clips[0])

    words = {
        False: "training: 1 added (dataset[4]); 1 of 5 indices stand for another clip",
        True: "beside the clips: 1 altered (dataset.fingerprint: another fingerprint)",
    }
    _refused_then_accepted(new, change, words[says])
