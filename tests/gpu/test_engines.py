"""Engines on CUDA devices: the local engine's numbers in every precision, nothing left after a rebuild,
saving beside training.

One launch on as many GPUs as there are, two at most, measures everything; the tests below only read it.
Offload is left out: its kernels are compiled on the machine. Run them with `pytest tests/gpu`; CI has no GPU
and skips them.
"""

from __future__ import annotations

import gc
import json
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiprod_ds.checkpoint.shard_files import write_shards
from aiprod_ds.checkpoint.staging import StagingBuffer
from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import deepspeed_engine, distance, is_same_state, optimized_state
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.resume.engine_files import capture, read_engine

FILES = {
    path.stem: path
    for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json")
    if "offload" not in path.stem
}
NAMES = sorted(FILES)
GLOBAL_BATCH = 8
UPDATES = 4
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, epsilon=1e-6)
# L2 distance of the fp32 parameters to the local engine's over the distance that the updates moved them. The
# engines add in another order, and 16-bit gradients of two ranks are rounded before they are added.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.1, "fp16": 0.03}
WARM_UPS, REBUILDS = 2, 10
REBUILT = [(f"zero{stage}_bf16", kind) for stage in range(4) for kind in ("plain", "lora")]
SAVED = ["zero0_bf16", "zero1_bf16", "zero2_fp16_v100", "zero3_bf16"]
LORA = LoraConfig(rank=4, targets=("to_q", "to_k", "to_v", "to_out.0"))

pytestmark = [pytest.mark.gpu, pytest.mark.dist]


@pytest.fixture(scope="session")
def measured() -> list[dict[str, Any]]:
    ranks = min(2, torch.cuda.device_count())
    results: list[dict[str, Any]] = run_on_ranks(
        measure, ranks=ranks, timeout_seconds=600, environment={"DS_ACCELERATOR": "cuda"}
    )
    return results


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_the_local_engine(measured: list[dict[str, Any]], name: str) -> None:
    case = measured[0]["updates"][name]
    assert case["moved"] > 0
    assert case["difference"] <= TOLERANCES[name.split("_")[1]]


@pytest.mark.parametrize(("name", "kind"), REBUILT)
def test_allocated_memory_goes_back_after_a_rebuild(
    measured: list[dict[str, Any]], name: str, kind: str
) -> None:
    for rank in measured:
        case = rank["rebuilt"][f"{name} {kind}"]
        assert case["while_built"] > case["bytes_left"][0]
        assert len(set(case["bytes_left"])) == 1, f"allocated bytes after each rebuild: {case['bytes_left']}"


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_beside_training_is_the_state_at_that_moment(
    measured: list[dict[str, Any]], name: str
) -> None:
    for rank in measured:
        assert rank["saved"][name] == {"is_pinned": True, "moved_on": True, "is_equal": True}


# Below runs on the ranks.


def measure() -> dict[str, Any]:
    return {
        "updates": {name: _measure_updates(name) for name in NAMES},
        "rebuilt": {f"{name} {kind}": _measure_rebuilding(name, kind) for name, kind in REBUILT},
        "saved": {name: _measure_saving(name) for name in SAVED},
    }


def _measure_updates(name: str) -> dict[str, float]:
    local = LocalEngine(
        net := _net(0),
        decay_groups(net),
        optimizer=OPTIMIZER,
        settings=_settings(name),
        micro_batch_size=GLOBAL_BATCH,
        accumulation=1,
    )
    start = local.module_state()
    with _engine(_net(0), name) as engine:
        for each in (local, engine):
            for update in range(UPDATES):
                _update(each, update)
        found, expected = engine.module_state(), local.module_state()
    if not dist.is_main():
        return {}
    moved = distance(expected, start)
    return {"moved": moved, "difference": distance(found, expected) / moved}


def _measure_rebuilding(name: str, kind: str) -> dict[str, Any]:
    """Builds engines on one transformer, with new adapters for each if there are any, and looks at what is
    left of them."""
    from aiprod_ds.models.lora import add_lora, remove_lora

    module, left, while_built = _transformer(), [], 0
    for _ in range(WARM_UPS + REBUILDS):
        if kind == "lora":
            add_lora(module, LORA, allowed=LTXVideo.lora_targets, seed=0)
        with _engine(module, name) as engine:
            _update_transformer(engine)
            while_built = torch.cuda.memory_allocated()
        del engine
        if kind == "lora":
            remove_lora(module)
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    return {"while_built": while_built, "bytes_left": left[WARM_UPS - 1 :]}


def _measure_saving(name: str) -> dict[str, bool]:
    folder = Path(dist.from_main(tempfile.mkdtemp))
    copies = StagingBuffer()
    with _engine(_net(0, width=4096), name) as engine:
        for update in range(2):
            _update(engine, update)
        expected = optimized_state(engine)
        captured = copies.take(capture(engine))
        for update in range(2, 4):
            _update(engine, update)
        moved_on = not _is_same_on_rank_0(optimized_state(engine), expected)
    write_shards(folder, captured)
    is_pinned = all(tensor.is_pinned() for tensor in captured.tensors if tensor.numel())
    dist.barrier()
    with _engine(_net(1, width=4096), name) as resumed:
        read_engine(folder, resumed)
        found = optimized_state(resumed)
    copies.release()
    return {"is_pinned": is_pinned, "moved_on": moved_on, "is_equal": _is_same_on_rank_0(found, expected)}


def _engine(module: nn.Module, name: str) -> AbstractContextManager[Any]:
    size = GLOBAL_BATCH // dist.world_size()
    return deepspeed_engine(module, optimizer=OPTIMIZER, settings=_settings(name), micro_batch_size=size)


def _settings(name: str) -> DeepSpeedSettings:
    values = json.loads(FILES[name].read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = (
            1000  # biases stay gathered, matrices do not
        )
    if "fp16" in values:
        values["fp16"] |= {"initial_scale_power": 8}  # no update is skipped
    return parse_deepspeed_settings(values, where="ds_configs")


def _net(seed: int, *, width: int = 64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))
        return nn.Sequential(*layers).to(dist.choose_device())


def _update(engine: Any, update: int) -> None:
    engine.set_learning_rate(1e-3)
    values = torch.randn(GLOBAL_BATCH, 64, generator=torch.Generator().manual_seed(update)).to(engine.device)
    own = values.chunk(engine.world_size)[engine.rank]
    engine.backward((engine(own.to(engine.compute_dtype)).float() - own).pow(2).mean())
    engine.step()


def _transformer() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    wide = {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256}
    return LTXVideoTransformer3DModel(**LTXVideo.tiny_config() | wide).to(dist.choose_device())


def _update_transformer(engine: Any) -> None:
    engine.set_learning_rate(1e-3)
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(2, *shape, generator=generator).to(engine.device) for shape in ((8, 4), (6, 16))
    )
    for _ in range(2):
        output = engine(
            hidden_states=latents.to(engine.compute_dtype),
            encoder_hidden_states=text.to(engine.compute_dtype),
            timestep=torch.full((2,), 500.0, device=engine.device),
            encoder_attention_mask=None,
            num_frames=2,
            height=2,
            width=2,
            return_dict=False,
        )[0]
        engine.backward((output.float() - latents).pow(2).mean())
        engine.step()


def _is_same_on_rank_0(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Returns on all ranks what rank 0 finds: the others have no tensors."""
    return dist.from_main(lambda: is_same_state(first, second))
