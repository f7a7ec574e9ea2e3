"""How the passes of a run are computed, as far as memory and time follow from it. Pure.

`aiprod_ds.train.performance` chooses it; `memory` and `roofline` read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """What a run computes with; by default everything is eager, one kernel after another.

    Attributes:
        compiles_blocks: Whether the repeated blocks run compiled.
        captures_passes: Whether passes are CUDA graphs wherever they can be.
        has_cudnn_first: Whether attention takes cuDNN's kernel.
        has_flat_parameters: Whether the trained weights of a block are a few flat parameters.
        activation_memory_budget: Share of its activations that a compiled block keeps, in [0, 1].
    """

    compiles_blocks: bool = False
    captures_passes: bool = False
    has_cudnn_first: bool = False
    has_flat_parameters: bool = False
    activation_memory_budget: float = 1.0
