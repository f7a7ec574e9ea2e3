"""The losses of a phase as CUDA graphs, one for each shape of its micro-batches.

Owns which graph a micro-batch belongs to. How passes are captured is `aiprod_ds.engine.captured`; whether
they are, `performance.py` decides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from aiprod_ds.curriculum.phase import PhasePlan
from aiprod_ds.data.loader import MicroBatch
from aiprod_ds.engine.captured import CapturedLoss
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.losses.terms import LossTerms
from aiprod_ds.train.unit import Unit

_LOG = logging.getLogger(__name__)
_SHAPES_OF_BUCKET = 4  # its clips, with prompts of a few lengths; each takes memory and seconds

_Shape = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(slots=True, kw_only=True)
class PhaseGraphs:
    """Computes the loss of micro-batches by replaying what was captured at the first of each shape.

    Attributes:
        engine: Must stay the same.
        unit: Its loss depends on the tensors of a micro-batch and on the phase alone.
        phase: Whose loss it is.
    """

    engine: Engine
    unit: Unit
    phase: PhasePlan
    _captured: dict[_Shape, CapturedLoss | None] = field(default_factory=dict)

    def loss(self, batch: MicroBatch, *, is_last: bool) -> LossTerms:
        """Returns what `unit.loss` does.

        Args:
            batch: Of the phase. Where a phase has more shapes than graphs are made for, or this one cannot
                be captured, it is computed without.
            is_last: Whether the update takes its gradients without those of another micro-batch.
        """
        shape = tuple(
            (name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in sorted(batch.tensors.items())
        )
        if shape not in self._captured:
            if len(self._captured) >= _SHAPES_OF_BUCKET * len(self.phase.buckets):
                return self.unit.loss(self.engine, batch, self.phase)
            self._captured[shape] = self._capture(batch)
        captured = self._captured[shape]
        if captured is None:
            return self.unit.loss(self.engine, batch, self.phase)
        found = captured(batch.tensors, is_last=is_last)
        return LossTerms(total=found.pop("total"), terms=found)

    def close(self) -> None:
        """Gives memory back. Idempotent."""
        for captured in self._captured.values():
            if captured is not None:
                captured.close()
        self._captured.clear()

    def _capture(self, batch: MicroBatch) -> CapturedLoss | None:
        def loss(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = self.unit.loss(self.engine, replace(batch, tensors=tensors), self.phase)
            return {"total": found.total, **found.terms}

        captured = self.engine.captured_loss(loss, batch.tensors)
        if captured.why_not is not None:
            _LOG.info("graphs_left_out phase=%s reason=%r", self.phase.name, captured.why_not)
            return None
        _LOG.info("graphs_captured phase=%s number=%d", self.phase.name, len(self._captured) + 1)
        return captured
