"""What a comparison of speed trains, said once for a trainer and for a bare loop.

Owns what every workload is and how the project's trainer gets it; the models are in `workloads.py`. Both
sides do the same work: the same module in the same type on the same shapes, and the same loss. What is the
trainer's alone is what is compared: drawing noise, reading clips, metrics, files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.trainers import trainer_class, trainer_config_class
from aiprod_ds.models.registry import build_model
from aiprod_ds.trainers.base import Trainer

_SETTINGS = Path(__file__).parents[1] / "ds_configs"
_UNREACHED = 100_000  # updates of a phase: whoever measures ends it

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one update trains on.

    Attributes:
        length: Frames; of sound, samples.
        size: Height and width; 0 for sound.
        batch: Clips.
    """

    length: int
    size: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What both sides are told.

    Attributes:
        precision: Of weights and gradients, as settings files name it.
        compiles: Whether the repeated blocks are compiled; None leaves it to the trainer's `auto`.
        zero_stage: Of DeepSpeed.
        engine: Of the trainer.
        lora_rank: Of the adapters that are trained in place of all weights.
        workers: Of the trainer's loader.
        recomputes: Whether the blocks are recomputed in the backward pass.
    """

    precision: str = "bf16"
    compiles: bool | None = None
    zero_stage: int = 1
    engine: str = "deepspeed"
    lora_rank: int | None = None
    workers: int = 2
    recomputes: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]

    def settings(self) -> dict[str, Any]:
        """Returns the shipped settings of DeepSpeed for stage and precision."""
        file = _SETTINGS / f"zero{self.zero_stage}_{self.precision}.json"
        values: dict[str, Any] = json.loads(file.read_text())
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(ABC):
    """One model with the shapes that it is trained in.

    Attributes:
        trainer: As in a configuration.
        source: Of diffusers.
        config: Arguments of the model.
        shapes: By phase.
    """

    trainer: str
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Shape]

    def model(self, device: str) -> nn.Module:
        """Returns the plain model in fp32; its weights are the same at each call."""
        return build_model(ModelConfig(source=self.source, config=self.config), seed=0, device=device)

    def trainer_of(
        self, shape: Shape, folder: Path, choices: Choices, *, model: nn.Module, performance: dict[str, Any]
    ) -> Trainer[Any]:
        """Returns the project's trainer with clips of noise, in a phase that does not end by itself."""
        phase = {
            "name": "measured",
            "duration": {"frames": shape.length},
            **({"resolution": f"{shape.size}x{shape.size}"} if shape.size else {}),
            "global_batch_size": shape.batch,
            "learning_rate": 1e-5,
            "updates": _UNREACHED,
            **({"activation_checkpointing": True} if choices.recomputes else {}),
        }
        values: dict[str, Any] = {
            "trainer": self.trainer,
            "output_dir": str(folder),
            "model": {"source": self.source, "config": self.config},
            "data": {"train": "unused", "num_workers": choices.workers},
            "curriculum": {"phases": [phase]},
            "engine": {"kind": choices.engine, "deepspeed_config": choices.settings()},
            "performance": performance,
            "checkpoint": {"every_updates": _UNREACHED},
            "evaluation": {"max_clips": 1, "num_pictures": 0},
        }
        config = trainer_config_class(self.trainer).model_validate(self.own_settings(values, choices))
        clips = [self.clip(shape, seed) for seed in range(2 * shape.batch)]
        made: Trainer[Any] = trainer_class(self.trainer)(
            config, model=model, dataset=clips, validation=clips[:1]
        )
        return made

    @abstractmethod
    def own_settings(self, values: dict[str, Any], choices: Choices) -> dict[str, Any]:
        """Returns a configuration with what only this trainer has."""

    @abstractmethod
    def clip(self, shape: Shape, seed: int) -> Any:
        """Returns an item of a dataset."""

    @abstractmethod
    def module(self, device: str, choices: Choices) -> nn.Module:
        """Returns what a bare loop trains, in the type of `choices`."""

    @abstractmethod
    def inputs(self, shape: Shape, device: str, choices: Choices) -> dict[str, Any]:
        """Returns one batch on the device."""

    @abstractmethod
    def loss(self, run: Run, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the loss of the batch, 0-dim fp32, computed by what is called as the module is."""

    def num_tokens(self, shape: Shape) -> int | None:  # noqa: ARG002  transformers have tokens
        """Returns the tokens of a clip; None where there are none."""
        return None

    def flops_per_update(self, shape: Shape, choices: Choices) -> float | None:  # noqa: ARG002  they have one
        """Returns what is credited for an update; None where the project has no convention for it."""
        return None
