"""Curriculum training of video VAEs, audio VAEs and latent diffusion transformers on DeepSpeed.

The public names can be imported from here; each is loaded from its own module when it is first used, so that
`import aiprod_ds` stays quick and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiprod_ds.clock import Clock
    from aiprod_ds.config.audio_vae import AudioVAETrainerConfig
    from aiprod_ds.config.curriculum import (
        CurriculumAdapterConfig,
        CurriculumConfig,
        CurriculumPhase,
        PhaseConfig,
        PhaseDuration,
        PhaseResolution,
    )
    from aiprod_ds.config.data import (
        AudioDataConfig,
        LatentDataConfig,
        VideoDataConfig,
    )
    from aiprod_ds.config.diffusion import DiffusionTrainerConfig
    from aiprod_ds.config.load import load_config
    from aiprod_ds.config.losses import (
        AudioVAELossConfig,
        FlowConfig,
        MelConfig,
        PerceptualConfig,
        SpectralConfig,
        VideoVAELossConfig,
    )
    from aiprod_ds.config.model import ModelConfig
    from aiprod_ds.config.run import EngineConfig
    from aiprod_ds.config.video_vae import VAETrainerConfig
    from aiprod_ds.curriculum.plan import plan_run
    from aiprod_ds.curriculum.scheduler import CurriculumScheduler
    from aiprod_ds.curriculum.strides import ModelStrides
    from aiprod_ds.data.own.iterables import ClipIterable
    from aiprod_ds.errors import ConfigError
    from aiprod_ds.losses import (
        AudioVAELoss,
        LossTerms,
        PerceptualLoss,
        SpectralLoss,
        VideoVAELoss,
    )
    from aiprod_ds.trainers.audio_vae import AudioVAETrainer
    from aiprod_ds.trainers.diffusion import DiffusionTrainer
    from aiprod_ds.trainers.video_vae import VideoVAETrainer

__all__ = [
    "AudioDataConfig",
    "AudioVAELoss",
    "AudioVAELossConfig",
    "AudioVAETrainer",
    "AudioVAETrainerConfig",
    "ClipIterable",
    "Clock",
    "ConfigError",
    "CurriculumAdapterConfig",
    "CurriculumConfig",
    "CurriculumPhase",
    "CurriculumScheduler",
    "DiffusionTrainer",
    "DiffusionTrainerConfig",
    "EngineConfig",
    "FlowConfig",
    "LatentDataConfig",
    "LossTerms",
    "MelConfig",
    "ModelConfig",
    "ModelStrides",
    "PerceptualConfig",
    "PerceptualLoss",
    "PhaseConfig",
    "PhaseDuration",
    "PhaseResolution",
    "SpectralConfig",
    "SpectralLoss",
    "VAETrainerConfig",
    "VideoDataConfig",
    "VideoVAELoss",
    "VideoVAELossConfig",
    "VideoVAETrainer",
    "load_config",
    "plan_run",
]

_MODULES = {
    "aiprod_ds.clock": ("Clock",),
    "aiprod_ds.config.audio_vae": ("AudioVAETrainerConfig",),
    "aiprod_ds.config.curriculum": (
        "CurriculumAdapterConfig",
        "CurriculumConfig",
        "CurriculumPhase",
        "PhaseConfig",
        "PhaseDuration",
        "PhaseResolution",
    ),
    "aiprod_ds.config.data": (
        "AudioDataConfig",
        "LatentDataConfig",
        "VideoDataConfig",
    ),
    "aiprod_ds.config.diffusion": ("DiffusionTrainerConfig",),
    "aiprod_ds.config.load": ("load_config",),
    "aiprod_ds.config.losses": (
        "AudioVAELossConfig",
        "FlowConfig",
        "MelConfig",
        "PerceptualConfig",
        "SpectralConfig",
        "VideoVAELossConfig",
    ),
    "aiprod_ds.config.model": ("ModelConfig",),
    "aiprod_ds.config.run": ("EngineConfig",),
    "aiprod_ds.config.video_vae": ("VAETrainerConfig",),
    "aiprod_ds.curriculum.plan": ("plan_run",),
    "aiprod_ds.curriculum.scheduler": ("CurriculumScheduler",),
    "aiprod_ds.curriculum.strides": ("ModelStrides",),
    "aiprod_ds.data.own.iterables": ("ClipIterable",),
    "aiprod_ds.errors": ("ConfigError",),
    "aiprod_ds.losses": (
        "AudioVAELoss",
        "LossTerms",
        "PerceptualLoss",
        "SpectralLoss",
        "VideoVAELoss",
    ),
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
