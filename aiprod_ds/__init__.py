"""Curriculum training of video VAEs, audio VAEs and latent diffusion transformers on DeepSpeed.

The public names can be imported from here; each is loaded from its own module when it is first used, so that
`import aiprod_ds` stays quick and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
    from aiprod_ds.config.curriculum import (
        CurriculumAdapterConfig,
        CurriculumConfig,
        CurriculumPhase,
        PhaseConfig,
        PhaseDuration,
        PhaseResolution,
    )
    from aiprod_ds.config.diffusion import DiffusionTrainerConfig
    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.curriculum.scheduler import CurriculumScheduler
    from aiprod_ds.data.own.iterables import ClipIterable
    from aiprod_ds.losses import AudioVAELoss, PerceptualLoss, SpectralLoss, VideoVAELoss
    from aiprod_ds.trainers.audio_vae import AudioVAETrainer
    from aiprod_ds.trainers.diffusion import DiffusionTrainer
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

__all__ = [
    "AudioVAELoss",
    "AudioVAETrainer",
    "AudioVAETrainerConfig",
    "ClipIterable",
    "CurriculumAdapterConfig",
    "CurriculumConfig",
    "CurriculumPhase",
    "CurriculumScheduler",
    "DiffusionTrainer",
    "DiffusionTrainerConfig",
    "PerceptualLoss",
    "PhaseConfig",
    "PhaseDuration",
    "PhaseResolution",
    "SpectralLoss",
    "VAETrainerConfig",
    "VideoVAELoss",
    "VideoVAETrainer",
]

_MODULES = {
    "aiprod_ds.config.audio_vae": ("AudioVAETrainerConfig",),
    "aiprod_ds.config.curriculum": (
        "CurriculumAdapterConfig",
        "CurriculumConfig",
        "CurriculumPhase",
        "PhaseConfig",
        "PhaseDuration",
        "PhaseResolution",
    ),
    "aiprod_ds.config.diffusion": ("DiffusionTrainerConfig",),
    "aiprod_ds.config.video_vae": ("VAETrainerConfig",),
    "aiprod_ds.curriculum.scheduler": ("CurriculumScheduler",),
    "aiprod_ds.data.own.iterables": ("ClipIterable",),
    "aiprod_ds.losses": ("AudioVAELoss", "PerceptualLoss", "SpectralLoss", "VideoVAELoss"),
    "aiprod_ds.trainers.audio_vae": ("AudioVAETrainer",),
    "aiprod_ds.trainers.diffusion": ("DiffusionTrainer",),
    "aiprod_ds.trainers.video_vae": ("VideoVAETrainer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names too, loaded or not."""
    return sorted({*globals(), *__all__})
