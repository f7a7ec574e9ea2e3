"""What training changes, in one record: the loop owns it, saving reads it, a change of phase may replace it.

Owns which parts there are and how they are made around an engine. The clock is not among them: it says when,
this says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aiprod_ds.clock import Clock
from aiprod_ds.config.run import RunConfig
from aiprod_ds.curriculum.phase import BucketPlan, PhasePlan
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.optim.adaptive_clip import AdaptiveClip
from aiprod_ds.optim.ema import Ema
from aiprod_ds.snapshot import Base
from aiprod_ds.train.unit import Companion


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The trained parameters and what follows them. Only a change of phase writes these fields.

    Attributes:
        engine: Holds weights, gradients and optimizer state; the one to close when a run ends.
        ema: The average of the weights that is evaluated in their place; None if the run keeps none.
        clip: Finds the norm to clip each update at; None if the run does not adapt it.
        base: The frozen weights that checkpoints refer to in place of holding them; None if they hold all.
        streams: Of a resumed run: where its data stood, as `RunState.streams`.
        companion: What is trained beside the module; None if nothing is. No change of phase replaces it.
    """

    engine: Engine
    ema: Ema | None = None
    clip: AdaptiveClip | None = None
    base: Base | None = None
    streams: Mapping[str, Any] = field(default_factory=dict)
    companion: Companion | None = None

    def begin_beside(
        self, clock: Clock, *, phase: PhasePlan, bucket: BucketPlan, learning_rate: float
    ) -> None:
        """Prepares the companion, if there is one, for an update; see `Companion.begin_update`."""
        if self.companion is not None:
            self.companion.begin_update(clock, phase=phase, bucket=bucket, learning_rate=learning_rate)

    def metrics_beside(self) -> Mapping[str, float | Tensor]:
        """Returns what the companion has to say of the update that has ended; nothing without one."""
        return {} if self.companion is None else self.companion.metrics()


def new_ema(engine: Engine, config: RunConfig) -> Ema | None:
    """Returns an average that begins at the engine's weights, if the run keeps one. Collective."""
    return None if config.ema is None else Ema(engine, config.ema)


def new_clip(config: RunConfig) -> AdaptiveClip | None:
    """Returns what finds the norm to clip at, if the run adapts it."""
    adaptive = config.optimizer.adaptive_clip
    return None if adaptive is None else AdaptiveClip(adaptive, fixed=config.optimizer.gradient_clip_norm)
