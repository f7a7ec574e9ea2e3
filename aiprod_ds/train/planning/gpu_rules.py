"""What a GPU without bf16 and flash attention (V100) cannot run, and how torch is set on it.

Owns the rules that need the model; those of the settings alone are in `aiprod_ds.planner.hardware`. Called by
`check --machine`, `plan --machine` and before a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings
from aiprod_ds.errors import ConfigError
from aiprod_ds.planner.hardware import Machine, settings_problems

_BACKEND_VARIABLE = "DIFFUSERS_ATTN_BACKEND"
_RUNS_ANYWHERE = ("native", "_native_efficient", "_native_math", "xformers")
_HEAD_MULTIPLE = 8  # of what the memory-efficient kernel takes in 16 bits


def require_runnable(model: nn.Module, settings: DeepSpeedSettings, machine: Machine, *, where: str) -> None:
    """Checks that the GPU can train the model with the settings.

    Args:
        model: May be on the meta device.
        where: How messages name the configuration.

    Raises:
        ConfigError: With everything that it cannot.
    """
    problems = [*settings_problems(settings, machine, where=where)]
    if not machine.has_bf16:
        problems += _attention_problems(model, settings, machine, where)
    if problems:
        raise ConfigError(problems)


def prepare_gpu(machine: Machine) -> None:
    """Sets torch for a GPU before 8.0: attention by the memory-efficient kernel, fp16 products summed in fp32
    throughout."""
    if machine.has_bf16:
        return
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=True)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _attention_problems(
    model: nn.Module, settings: DeepSpeedSettings, machine: Machine, where: str
) -> Iterator[str]:
    backend = os.environ.get(_BACKEND_VARIABLE, "native")
    if backend not in _RUNS_ANYWHERE:
        yield (
            f"{where}: {_BACKEND_VARIABLE}: must be one of {', '.join(_RUNS_ANYWHERE)} on {machine.name}, "
            f"got {backend!r}, which "
            "needs a newer GPU. Unset it."
        )
    config = getattr(model, "config", {})
    for key in ("attention_head_dim", "audio_attention_head_dim"):
        width = config.get(key) if hasattr(config, "get") else None
        if settings.precision == "fp16" and isinstance(width, int) and width % _HEAD_MULTIPLE:
            yield (
                f"{where}: model.{key}: must be a multiple of {_HEAD_MULTIPLE} in fp16 on {machine.name}, "
                f"got {width}: attention "
                "would keep every score. Take another model, or fp32."
            )
