"""What an audio run makes of its files: held-out sounds, files that cannot be used, the probe cache, a stream
of waveforms."""

from __future__ import annotations

import shutil
import wave
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aiprod_ds.clock import Clock
from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
from aiprod_ds.config.data import AudioDataConfig
from aiprod_ds.curriculum.phase import RunPlan
from aiprod_ds.curriculum.plan import plan_run
from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.errors import DataError
from aiprod_ds.trainers.open_data import open_audio_datasets, open_audio_files

RATE_HZ = 8_000


def _save(path: Path, *, seed: int, samples: int = 4_000, level: float = 0.2) -> None:
    noise = torch.rand(samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes((noise * level * 32_767).round().numpy().astype("<i2").tobytes())


def _config(folder: Path, **changes: Any) -> AudioDataConfig:
    return AudioDataConfig(
        **{"train": str(folder), "sample_rate_hz": RATE_HZ, "channels": 2, "num_workers": 0, **changes}
    )


def _plan(config: AudioDataConfig, frames: int) -> RunPlan:
    phase = {
        "name": "p",
        "duration": {"frames": frames},
        "global_batch_size": 2,
        "updates": 5,
        "learning_rate": 1e-3,
    }
    data = config.model_dump(mode="json")
    values = {"output_dir": "o", "model": {"source": "M"}, "data": data, "curriculum": {"phases": [phase]}}
    strides = ModelStrides(spatial=1, temporal=8, is_causal=False)
    return plan_run(AudioVAETrainerConfig.model_validate(values), world_size=1, strides=strides)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        _save(tmp_path / "sounds" / f"{number}.wav", seed=number)
    return tmp_path / "sounds"


def test_files_become_a_stream_of_waveforms(folder: Path) -> None:
    config = _config(folder, holdout_fraction=0.25)
    data = open_audio_files(config, seed=0)
    plan = _plan(config, 2_048)
    assert (len(data.train_clips), len(data.validation_clips), data.unreadable) == (3, 1, ())
    assert data.check(plan, "c") == ()
    stream = data.stream(plan.phases[0], Clock(), rank=0, world_size=1, seed=0, num_workers=0)
    batches = list(islice(stream, 3))
    stream.close()
    assert [(set(batch.tensors), batch.tensors["audio"].shape) for batch in batches] == [
        ({"audio"}, (2, 2, 2_048))
    ] * 3
    assert torch.equal(batches[0].tensors["audio"][:, 0], batches[0].tensors["audio"][:, 1]), (
        "mono is repeated"
    )
    assert data.held_out_clip(0, plan.phases[0].buckets[0])["audio"].shape == (2, 2_048)


def test_files_that_cannot_be_used_are_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "empty.wav").touch()
    (folder / "torn.flac").write_bytes(b"fLaC not a sound")
    _save(folder / "silent.wav", seed=9, level=1e-5)
    shutil.copytree(folder, tmp_path / "held_out")
    config = _config(
        folder, validation=str(tmp_path / "held_out"), max_unreadable_fraction=0.5, silence_threshold_db=-60.0
    )
    data = open_audio_files(config, seed=0)
    assert (len(data.train_clips), len(data.validation_clips)) == (4, 4)
    names = [path for path, _ in data.unreadable]
    assert sorted(names) == sorted(["empty.wav", "torn.flac", "silent.wav"] * 2), "of both sets"
    assert all(reason for _, reason in data.unreadable)


def test_too_many_unreadable_files_stop_the_run(folder: Path) -> None:
    (folder / "empty.wav").touch()
    with pytest.raises(DataError, match=r"at most 5% of the clips may be unreadable, got 1 of 5: empty.wav"):
        open_audio_files(_config(folder), seed=0)


def test_a_silent_file_in_the_place_of_all_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "sounds" / "silent.wav", seed=9, level=1e-5)
    with pytest.raises(DataError, match="no clip is readable"):
        open_audio_files(_config(tmp_path / "sounds", silence_threshold_db=-60.0), seed=0)


def test_datasets_must_hold_sounds() -> None:
    with pytest.raises(DataError, match="must hold at least one clip each, got 1 for training, 0 held out"):
        open_audio_datasets([torch.zeros(10)], [], _config(Path("unused")), seed=0)
