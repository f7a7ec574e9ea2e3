"""The sections that every trainer shares: model source, optimizer, engine, checkpoints, evaluation, report.

Owns their schema; `vae.py` and `diffusion.py` put them together. Nothing here is derived: batch triples and phase bounds are
computed in `aiprod_ds.curriculum.plan`, the DeepSpeed dictionary in `aiprod_ds.config.deepspeed`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from aiprod_ds.config.model import (
    Fraction,
    FreeMapping,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictModel,
)


class ModelConfig(StrictModel):
    """Where the network comes from.

    `source` is a diffusers class name (`AutoencoderKLLTXVideo`) or an import path (`my_package.models:MyVAE`). `config` holds
    the constructor's keyword arguments (random weights); `pretrained` a local folder or hub name for `from_pretrained`.
    """

    source: str = Field(min_length=1)
    config: FreeMapping = Field(default_factory=dict)
    pretrained: str | None = None
    spatial_stride: PositiveInt | None = None
    temporal_stride: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained is not None and self.config:
            raise ValueError("config: has no effect when pretrained is set, got both. Remove one of the two.")
        return self


class OptimizerConfig(StrictModel):
    """AdamW; the learning rate belongs to the phases. Vectors and biases are not decayed."""

    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), strict=False)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    gradient_clip_norm: PositiveFloat | None = 1.0


class EngineConfig(StrictModel):
    """Which engine owns parameters, gradients and optimizer state.

    `deepspeed_config` is a file (relative to the configuration file or to the working folder) or the mapping itself. It holds
    only what DeepSpeed owns: ZeRO stage, precision, activation checkpointing, offload, buckets. `kind: local` runs the same
    precision and checkpointing settings in plain PyTorch on one process, as the control for numerics.
    """

    kind: Literal["deepspeed", "local"] = "deepspeed"
    deepspeed_config: str | FreeMapping = "ds_configs/zero1_bf16.json"


class CheckpointConfig(StrictModel):
    """When to save: every so many updates, at every phase edge and at the end."""

    every_updates: PositiveInt = 500


class EvaluationConfig(StrictModel):
    """How held-out clips are measured; the geometry defaults to that of the last phase, so that figures compare across phases."""

    max_clips: PositiveInt = 16
    num_pictures: NonNegativeInt = 4


class WandbConfig(StrictModel):
    """Weights & Biases mirror; a failure of it never stops training."""

    mode: Literal["online", "offline", "off"] = "off"
    project: str = "aiprod_ds"
    name: str | None = None
    tags: tuple[str, ...] = Field(default=(), strict=False)


class ReportConfig(StrictModel):
    """Metrics and the run report. `flush_updates` is how often device metrics are read, reduced over ranks and written."""

    flush_updates: PositiveInt = 10
    tensorboard: bool = False
    wandb: WandbConfig = WandbConfig()
