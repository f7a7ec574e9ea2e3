"""Which operations of an fp16 model run in fp32: norms, softmax, positions and timesteps of every family of
transformers.

Oracle: the types that reach torch, recorded on the meta device, where fp16 needs no support of the processor.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aiprod_ds.curriculum.strides import ModelStrides
from aiprod_ds.models.diffusion import DiffusionModule
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.models.families.ltx2 import LTX2
from aiprod_ds.models.families.protocol import Family
from aiprod_ds.models.families.wan import Wan
from aiprod_ds.models.shapes import on_meta
from aiprod_ds.testing.families import tiny_batch, tiny_transformer, velocities

# What overflows or loses digits in fp16: squares and their means, exponentials, angles.
DELICATE = ("pow", "mean", "rsqrt", "var_mean", "_softmax", "_safe_softmax", "exp", "log", "sin", "cos")
STRIDES = {
    LTXVideo: ModelStrides(spatial=32, temporal=8),
    LTX2: ModelStrides(spatial=32, temporal=8),
    Wan: ModelStrides(spatial=8, temporal=4),
}


class _Types(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next((value for value in args if isinstance(value, Tensor) and value.dim() > 0), None)
        if first is not None:
            self.found[func.overloadpacket.__name__, first.dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family_type", [LTXVideo, LTX2, Wan])
def test_delicate_operations_of_transformers_run_in_fp32(family_type: type[Family]) -> None:
    transformer = tiny_transformer(family_type).half()
    family = family_type.of(transformer, STRIDES[family_type])
    module = DiffusionModule(on_meta(transformer), family)
    batch = {
        name: (tensor.half() if tensor.is_floating_point() and name != "fps" else tensor).to("meta")
        for name, tensor in tiny_batch().items()
    }

    def predict(noisy: Any, levels: Any, tensors: Any, grids: Any) -> Any:
        return module(noisy, {name: level.to("meta") for name, level in levels.items()}, tensors, grids)

    with _Types() as types:
        velocities(predict, family, batch)

    narrow = {
        name: count
        for (name, dtype), count in types.found.items()
        if name in DELICATE and dtype == torch.float16
    }
    assert narrow == {}
    assert types.found["rsqrt", torch.float32] > 0
    assert (
        types.found["mm", torch.float16] + types.found["addmm", torch.float16] > 0
    )  # and products run in 16 bits
