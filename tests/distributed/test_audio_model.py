"""Oobleck with weight norm under ZeRO 0 to 3 on two ranks against the plain PyTorch engine on one, with and
without activation checkpointing.

One call runs all cases on both ranks and returns measurements; the tests below only read them. The oracle
is `LocalEngine` with the whole batch on one process. `test_engine.py` has the cases that do not depend on the
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.model import ModelConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.models.audio_vae import wrap_audio_vae
from aiprod_ds.models.registry import build_model
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import deepspeed_engine, distance
from aiprod_ds.testing.tiny import tiny_oobleck
from aiprod_ds.train.engines import decay_groups

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = [
    "zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32",
    "zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16",
    "zero1_fp16_v100", "zero2_fp16_v100", "zero3_fp16_v100",
]  # fmt: skip
# Every stage, every precision, and ZeRO-3, which differs most, in two; the others in `make test-all`.
FEW = {"zero0_fp32", "zero1_bf16", "zero2_fp16_v100", "zero3_fp32", "zero3_bf16"}
CASES = [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in FILES]
RANKS = 2
GLOBAL_BATCH = 4
UPDATES = 4
SAMPLES = 256
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, weight_decay=0.1)
# Not 8 channels: see tests/unit/models/test_audio_vae.py.
MODEL = ModelConfig(source="AutoencoderOobleck", config=tiny_oobleck(width=16, latent_channels=8))

# Largest difference to the oracle in the losses and the gradient norms (at most 9.4), and the L2 distance of
# the final fp32 parameters over the distance that training moved them. fp32: sums in another order, through 4
# updates. 16 bit: gradients are rounded to 8 resp. 11 bits before they are summed over ranks. Measured: fp32
# 6e-8, 1e-6, 2e-7; bf16 3e-4, 0.017, 0.003; fp16 1.2e-3, 0.035, 0.013 (the updates are large, and the third
# doubles every difference).
TOLERANCES = {"fp32": (1e-6, 1e-5, 2e-6), "bf16": (1e-3, 0.05, 0.01), "fp16": (4e-3, 0.1, 0.04)}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def measured(wanted: Callable[[str], list[str]]) -> dict[str, Any]:
    results: list[dict[str, Any]] = run_on_ranks(
        measure_everything, ranks=RANKS, arguments={"names": wanted("name")}, timeout_seconds=600
    )
    assert [case["losses"] for case in results[0].values()] == [
        case["losses"] for case in results[1].values()
    ]
    return results[0]


@pytest.mark.parametrize("recompute", ["", " recomputed"])
@pytest.mark.parametrize("name", CASES)
def test_weight_norm_trains_as_in_the_local_engine(
    measured: dict[str, Any], name: str, recompute: str
) -> None:
    case = measured[name + recompute]
    loss, norm, parameter = TOLERANCES[_precision(name)]
    assert case["loss_difference"] <= loss
    assert case["norm_difference"] <= norm
    assert case["parameter_difference"] <= parameter


@pytest.mark.parametrize("name", CASES)
def test_directions_and_gains_are_trained(measured: dict[str, Any], name: str) -> None:
    moved = measured[name]["moved"]
    assert sorted(moved) == ["alpha", "beta", "bias", "weight_g", "weight_v"]
    assert all(distance > 0.1 for distance in moved.values()), "otherwise the comparison shows nothing"


@pytest.mark.parametrize("name", CASES)
def test_recomputation_runs_every_block_twice_and_changes_nothing(
    measured: dict[str, Any], name: str
) -> None:
    plain, recomputed = measured[name], measured[f"{name} recomputed"]
    assert recomputed["losses"] == plain["losses"]
    assert (plain["block_forwards"], recomputed["block_forwards"]) == (UPDATES, 2 * UPDATES)


def _precision(name: str) -> str:
    return name.split("_")[1]


# Below runs on the ranks.


def measure_everything(names: Sequence[str]) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    oracles = {precision: _oracle(f"zero2_{suffix}") for precision, suffix in _SUFFIXES.items()}
    results = {}
    for name in names:
        results[name] = _measure(name, oracles[_precision(name)], recompute=False)
        results[f"{name} recomputed"] = _measure(name, oracles[_precision(name)], recompute=True)
    return results


_SUFFIXES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16_v100"}


def _oracle(name: str) -> dict[str, Any]:
    module = _module()
    engine = LocalEngine(
        module,
        decay_groups(module),
        optimizer=OPTIMIZER,
        settings=_settings(name),
        micro_batch_size=GLOBAL_BATCH // RANKS,
        accumulation=RANKS,
    )
    start = engine.module_state()
    return {"records": _train(engine), "start": start, "module": engine.module_state()}


def _measure(name: str, oracle: dict[str, Any], *, recompute: bool) -> dict[str, Any]:
    module = _module()
    forwards: list[int] = []
    module.vae.encoder.block[0].res_unit1.register_forward_hook(lambda *_: forwards.append(1))
    set_recompute(module, enabled=recompute)
    share = GLOBAL_BATCH // RANKS
    with deepspeed_engine(
        module, optimizer=OPTIMIZER, settings=_settings(name), micro_batch_size=share
    ) as engine:
        records = _train(engine)
        state = engine.module_state()
    differences = [
        [abs(a - b) for a, b in zip(*pair, strict=True)]
        for pair in zip(records, oracle["records"], strict=True)
    ]
    return {
        "losses": [record[0] for record in records],
        "loss_difference": max(difference[0] for difference in differences),
        "norm_difference": max(difference[1] for difference in differences),
        "parameter_difference": distance(state, oracle["module"]) / distance(state, oracle["start"])
        if dist.is_main()
        else 0.0,
        "moved": _moved(state, oracle["start"]) if dist.is_main() else {},
        "block_forwards": len(forwards),
    }


def _module() -> Any:
    return wrap_audio_vae(build_model(MODEL, seed=0))


def _settings(name: str) -> DeepSpeedSettings:
    values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = (
            0  # the module is smaller than the usual threshold
        )
    if "fp16" in values:
        values["fp16"] |= {"initial_scale_power": 8}
    return parse_deepspeed_settings(values, name)


def _train(engine: Engine) -> list[list[float]]:
    """Returns mean loss and gradient norm of every update.

    One process computes the ranks' shares one after another: in 16 bits a CPU may round a whole batch
    otherwise than its halves.
    """
    records = []
    shares = range(RANKS) if engine.world_size == 1 else [engine.rank]
    for update in range(UPDATES):
        engine.set_learning_rate(1e-2)
        losses, result = [], None
        for share in (slice(first, None, RANKS) for first in shares):
            wave_BCN, seeds = _batch(update)[share], list(range(GLOBAL_BATCH))[share]
            reconstruction, mean, logvar = engine(wave_BCN.to(engine.compute_dtype), seeds)
            loss = (reconstruction.float() - wave_BCN).abs().mean() + 0.01 * (
                mean.square() + logvar.exp() - logvar
            ).mean()
            engine.backward(loss)
            result = engine.step()
            losses.append(loss.detach())
        assert result is not None
        assert result.applied
        mean_loss = torch.stack(losses).mean()
        together = dist.reduce_mean(mean_loss) if engine.world_size > 1 else mean_loss
        records.append([together.item(), float(result.gradient_norm)])
    return records


def _batch(update: int) -> Tensor:
    return torch.rand(GLOBAL_BATCH, 2, SAMPLES, generator=torch.Generator().manual_seed(update)) * 2 - 1


def _moved(state: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far the tensors of each kind moved, by the last part of their names."""
    kinds: dict[str, list[str]] = {}
    for key in start:
        kinds.setdefault(key.rpartition(".")[2], []).append(key)
    return {
        kind: distance({key: state[key] for key in keys}, {key: start[key] for key in keys})
        for kind, keys in kinds.items()
    }
