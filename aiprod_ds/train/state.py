"""What training changes, in one record: the loop owns it, saving reads it, a change of phase may replace it.

Owns which parts there are and how they are made around an engine. The clock is not among them: it says when,
this says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiprod_ds.config.run import RunConfig
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.optim.adaptive_clip import AdaptiveClip
from aiprod_ds.optim.ema import Ema
from aiprod_ds.snapshot import Base


@dataclass(slots=True, kw_only=True)
class TrainState:
    """The trained parameters and what follows them. Only a change of phase writes these fields.

    Attributes:
        engine: Holds weights, gradients and optimizer state; the one to close when a run ends.
        ema: The average of the weights that is evaluated in their place; None if the run keeps none.
        clip: Finds the norm to clip each update at; None if the run does not adapt it.
        base: The frozen weights that checkpoints refer to in place of holding them; None if they hold all.
        streams: Of a resumed run: where its data stood, as `RunState.streams`.
    """

    engine: Engine
    ema: Ema | None = None
    clip: AdaptiveClip | None = None
    base: Base | None = None
    streams: Mapping[str, Any] = field(default_factory=dict)


def new_ema(engine: Engine, config: RunConfig) -> Ema | None:
    """Returns an average that begins at the engine's weights, if the run keeps one. Collective."""
    return None if config.ema is None else Ema(engine, config.ema)


def new_clip(config: RunConfig) -> AdaptiveClip | None:
    """Returns what finds the norm to clip at, if the run adapts it."""
    adaptive = config.optimizer.adaptive_clip
    return None if adaptive is None else AdaptiveClip(adaptive, fixed=config.optimizer.gradient_clip_norm)
