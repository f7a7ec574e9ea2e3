"""What DeepSpeed holds between the parts of an update on two ranks, counted tensor by tensor, against
`aiprod_ds.planner.memory`.

One call measures all stages; the tests below only read. Copies that live inside `step` differ between CPU
and GPU and are not counted here: those were measured on an H200 (`benchmarks/planner_accuracy.py`).
"""

from __future__ import annotations

import functools
import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.testing.dist import run_on_ranks

RANKS, WIDTH, LAYERS, BUCKET, PARTITIONED = 2, 256, 8, 50_000, 3
PARAMETERS = LAYERS * (WIDTH * WIDTH + WIDTH)
_LETTING_GO_SECONDS = 0.2  # gloo's thread holds what it has summed for some moments after it is done
FILES = Path(__file__).parents[2] / "ds_configs"

pytestmark = pytest.mark.dist


class _Held(TorchDispatchMode):
    """Bytes of the CPU tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def _measure(names: list[str]) -> dict[str, list[float]]:
    """Returns for each file the bytes per parameter after an update and after the backward pass of the
    next."""
    from deepspeed.accelerator import get_accelerator  # which the tests need not

    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine

    get_accelerator().is_fp16_supported = lambda: True
    found = {}
    for name in names:
        values = json.loads((FILES / f"{name}.json").read_text())
        if values["zero_optimization"]["stage"]:
            values["zero_optimization"]["reduce_bucket_size"] = BUCKET
        if values["zero_optimization"]["stage"] == PARTITIONED:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = (
                0  # the layers here are as small as what stays
            )
        settings = parse_deepspeed_settings(values, where=name)
        with _Held() as held:
            module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
            groups = [
                ParameterGroup(names=tuple(key for key, _ in module.named_parameters()), is_decayed=True)
            ]
            engine = DeepSpeedEngine(
                module,
                groups,
                optimizer=OptimizerConfig(),
                settings=settings,
                micro_batch_size=1,
                accumulation=1,
            )
            sizes = []
            for _ in range(2):
                loss = engine(torch.ones(1, WIDTH, dtype=engine.compute_dtype)).float().square().mean()
                held.peak = held.bytes
                engine.backward(loss)
                del loss
                time.sleep(_LETTING_GO_SECONDS)
                after_backward, peak = held.bytes, held.peak
                engine.step()
                sizes = [size / PARAMETERS for size in (held.bytes, after_backward, peak)]
        engine.close()
        found[name] = sizes
    return found


@functools.cache
def _found() -> list[dict[str, list[float]]]:
    return run_on_ranks(_measure, ranks=RANKS, arguments={"names": sorted(EXPECTED)})


# Bytes per parameter on two ranks: what stays, and the gradients after backward. Reduction buckets of 50,000
# elements: 0.2.
EXPECTED = {
    "zero0_bf16": (2 + 12, 2),
    "zero1_fp32": (4 + 12 / 2, 4 / 2),
    "zero1_bf16": (2 + 12 / 2, 2 / 2),
    "zero2_bf16": (2 + 12 / 2, 4 / 2),
    "zero1_fp16_v100": (2 + 12 / 2, 4),
    "zero2_fp16_v100": (2 + 12 / 2, 4 / 2),
    "zero3_bf16": (2 / 2 + 12 / 2 + 4 / 2, 0),  # the sums of its gradients stay from update to update
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_rank_holds_what_the_table_says(name: str) -> None:
    resident, gradients = EXPECTED[name]
    for rank in _found():
        after_update, after_backward, _ = rank[name]
        assert after_update == pytest.approx(
            resident, abs=0.5
        )  # buckets, norms, padding, biases kept whole at stage 3
        assert after_backward - after_update == pytest.approx(
            gradients, abs=0.8
        )  # and a gradient on its way to be freed
