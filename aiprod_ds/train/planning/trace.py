"""What the micro-batches of a trainer's phases take, found by running its own loss on the meta device.

Owns the stand-ins for engine and data; what is counted is `aiprod_ds.models.tracing`'s. Called by the planner
and where a run chooses its own settings. Takes about a second for each shape, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import Precision
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan, RunPlan
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.data.sampler import SampleRef
from aiprod_ds.engine.layout import TORCH_DTYPES
from aiprod_ds.engine.recompute import repeated_blocks, set_recompute
from aiprod_ds.models.tracing import forward_bytes, trace
from aiprod_ds.planner.workload import Workload
from aiprod_ds.train.unit import Unit


class Shaped(Protocol):
    """What is asked of a trainer; each is one."""

    config: Any
    source: str

    @property
    def shapes(self) -> nn.Module:
        """The model, on the meta device unless it was passed in."""

    def blank_clip(self, bucket: BucketPlan) -> dict[str, Tensor]:
        """Returns what a clip consists of, on the meta device."""

    def blank_unit(self, plan: RunPlan) -> Unit:
        """Returns the unit without weights and data, on the meta device."""

    def preview_shapes(self, plan: RunPlan) -> tuple[tuple[str, BucketPlan], ...]:
        """Returns the shapes of clips to sample that are not those of a phase, with the dotted path of
        each."""


class Workloads:
    """Traces of one trainer's phases; each is made once.

    Args:
        trainer: Of the run; neither its data nor its weights are read.
    """

    def __init__(self, trainer: Shaped, plan: RunPlan, *, precision: Precision) -> None:
        self._trainer = trainer
        self._plan = plan
        self._dtype = TORCH_DTYPES[precision]
        self._found: dict[tuple[int, int, int, int], Workload] = {}
        self._unit: tuple[int, Unit] | None = None

    def of(self, phase: PhasePlan, bucket: int, *, micro_batch_size: int, recompute: int) -> Workload:
        """Returns what one micro-batch takes.

        Args:
            phase: One of the plan's.
            bucket: Which of its buckets.
            micro_batch_size: Clips of it, in place of the bucket's own.
            recompute: Every how many blocks one is computed again in the backward pass; 0: none is.

        Raises:
            EngineError: If the blocks are to be recomputed and the model has none.
        """
        key = (phase.index, bucket, micro_batch_size, recompute)
        if key not in self._found:
            unit = self._unit_of(phase)
            set_recompute(unit.module, enabled=recompute > 0, every=max(recompute, 1))
            clip = self._trainer.blank_clip(phase.buckets[bucket])
            self._found[key] = _traced(unit, phase, clip, bucket, micro_batch_size, self._dtype)
        return self._found[key]

    def forward_bytes(self, phase: PhasePlan, bucket: BucketPlan) -> int:
        """Returns what a forward pass of one clip without gradients holds, beside weights.

        Args:
            phase: One of the plan's.
            bucket: Any shape.
        """
        unit = self._unit_of(phase)
        unit.module.eval()
        clip = self._trainer.blank_clip(bucket)
        return forward_bytes(unit.module, partial(_loss, unit, phase, clip, 0, 1, self._dtype))

    def _unit_of(self, phase: PhasePlan) -> Unit:
        if self._unit is None or self._unit[0] != phase.index:
            unit = self._trainer.blank_unit(self._plan)
            unit.prepare(phase)
            for parameter in unit.module.parameters():
                parameter.data = parameter.data.to(self._dtype)
            self._unit = (phase.index, unit)
        return self._unit[1]


class _ShapesEngine:
    """The part of an `Engine` that a loss uses."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self.device, self.compute_dtype = torch.device("meta"), dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)


def _traced(
    unit: Unit, phase: PhasePlan, clip: Mapping[str, Tensor], bucket: int, size: int, dtype: torch.dtype
) -> Workload:
    unit.module.train()
    loss = partial(_loss, unit, phase, clip, bucket, size, dtype)
    return trace(unit.module, loss, blocks=list(repeated_blocks(unit.module)))


def _loss(
    unit: Unit, phase: PhasePlan, clip: Mapping[str, Tensor], bucket: int, size: int, dtype: torch.dtype
) -> Tensor:
    engine = cast("Any", _ShapesEngine(unit.module, dtype))
    tensors = {name: tensor.new_ones((size, *tensor.shape)) for name, tensor in clip.items()}
    places = [(phase.index, 0, ordinal) for ordinal in range(size)]
    tensors |= {name: drawn.to("meta") for name, drawn in unit.draws(tensors, places).items()}
    samples = [SampleRef(sample_index=0, epoch=0, ordinal=ordinal) for ordinal in range(size)]
    batch = MicroBatch(tensors=tensors, samples=samples, bucket=bucket, position=0)
    return unit.loss(engine, batch, phase).total
