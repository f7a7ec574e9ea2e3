"""A tiny transformer of each family, a batch for it, what it answers, and the pipeline that diffusers has for
it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from aiprod_ds.config.model import LoraConfig
from aiprod_ds.models.families.protocol import Family


def tiny_transformer(family_type: type[Family], *, seed: int = 0) -> Any:
    """Returns the family's transformer by `tiny_config`, fp32, with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(diffusers, family_type.transformer_class)(**family_type.tiny_config())


def adapted_transformer(family_type: type[Family], config: LoraConfig) -> Any:
    """Returns the tiny transformer with adapters that change what it answers."""
    from aiprod_ds.models.lora import add_lora  # loads peft

    transformer = tiny_transformer(family_type)
    add_lora(transformer, config, allowed=family_type.lora_targets, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:  # they start at zero
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transformer


def tiny_batch(*, seed: int = 0) -> dict[str, Tensor]:
    """Returns two samples for any tiny transformer: 32 tokens of video, 7 of sound, prompts of 6 and 4
    tokens; noise levels 0.3 and 0.8."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, 4, 2, 4, 4, generator=generator),
        "audio_latents": torch.randn(2, 2, 7, 4, generator=generator),
        "prompt_embeds": torch.randn(2, 6, 16, generator=generator),
        "prompt_attention_mask": torch.arange(6) < torch.tensor([[6], [4]]),
        "fps": torch.tensor([24.0, 12.0]),
        "levels": torch.tensor([[0.3], [0.8]]),
    }


def velocities(
    predict: Callable[..., Mapping[str, Tensor]], family: Family, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Returns what is predicted for the latents as they are at their noise levels, of all modalities,
    flattened.

    Args:
        predict: A `DiffusionModule`, or an engine that holds one.
        family: Of its transformer.
        tensors: From `tiny_batch`.
    """
    tokens = family.tokens(tensors)
    noisy = {name: part.values for name, part in tokens.items()}
    levels = dict.fromkeys(tokens, tensors["levels"])
    grids = {name: part.grid for name, part in tokens.items()}
    return torch.cat([values.flatten() for values in predict(noisy, levels, tensors, grids).values()])


def pipeline_around(transformer: nn.Module, family: Family) -> Any:
    """Returns diffusers' pipeline with `transformer` in it and nothing else; it can load adapters, not
    sample."""
    pipeline = getattr(diffusers, family.pipeline_class)
    parameters = inspect.signature(pipeline).parameters.values()
    missing = {
        parameter.name: None for parameter in parameters if parameter.default is inspect.Parameter.empty
    }
    return pipeline(**{**missing, "transformer": transformer})
