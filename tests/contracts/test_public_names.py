"""What `from aiprod_ds import ...` offers, and that `import aiprod_ds` loads nothing heavy for it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import aiprod_ds

DOCUMENTED = {
    "aiprod_ds.clock": ["Clock"],
    "aiprod_ds.config.audio_vae": ["AudioVAETrainerConfig"],
    "aiprod_ds.config.curriculum": [
        "CurriculumAdapterConfig", "CurriculumConfig", "CurriculumPhase", "PhaseConfig", "PhaseDuration", "PhaseResolution",  # noqa: E501
    ],
    "aiprod_ds.config.data": ["AudioDataConfig", "LatentDataConfig", "VideoDataConfig"],
    "aiprod_ds.config.diffusion": ["DiffusionTrainerConfig"],
    "aiprod_ds.config.load": ["load_config"],
    "aiprod_ds.config.losses": [
        "AudioVAELossConfig", "FlowConfig", "MelConfig", "PerceptualConfig", "SpectralConfig", "VideoVAELossConfig",  # noqa: E501
    ],
    "aiprod_ds.config.model": ["ModelConfig"],
    "aiprod_ds.config.run": ["EngineConfig"],
    "aiprod_ds.config.video_vae": ["VAETrainerConfig"],
    "aiprod_ds.curriculum.plan": ["plan_run"],
    "aiprod_ds.curriculum.scheduler": ["CurriculumScheduler"],
    "aiprod_ds.curriculum.strides": ["ModelStrides"],
    "aiprod_ds.data.own.iterables": ["ClipIterable"],
    "aiprod_ds.errors": ["ConfigError"],
    "aiprod_ds.losses": ["AudioVAELoss", "LossTerms", "PerceptualLoss", "SpectralLoss", "VideoVAELoss"],
    "aiprod_ds.trainers.audio_vae": ["AudioVAETrainer"],
    "aiprod_ds.trainers.diffusion": ["DiffusionTrainer"],
    "aiprod_ds.trainers.video_vae": ["VideoVAETrainer"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in DOCUMENTED.items() for name in names]
)
def test_public_names_are_the_ones_of_their_modules(module: str, name: str) -> None:
    assert getattr(aiprod_ds, name) is getattr(importlib.import_module(module), name)
    assert name in dir(aiprod_ds)


def test_no_name_is_missing_or_extra() -> None:
    assert sorted(aiprod_ds.__all__) == sorted(name for names in DOCUMENTED.values() for name in names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aiprod_ds' has no attribute 'VideoTrainer'"):
        aiprod_ds.VideoTrainer  # noqa: B018


def test_configuration_and_scheduler_load_no_torch() -> None:
    probe = (
        "import sys, aiprod_ds\n"
        "assert not [name for name in sys.modules if name.startswith('aiprod_ds.')]\n"
        "from aiprod_ds import CurriculumConfig, CurriculumScheduler, VAETrainerConfig\n"
        "assert 'torch' not in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
