"""The DeepSpeed engine on two ranks against the plain PyTorch engine on one, for every settings file that
ships.

One call runs all cases on both ranks and returns measurements; the tests below only read them. The oracle
is `LocalEngine` with the whole batch on one process. Both engines see the same data and learning rates; the
module mixes Conv3d, GroupNorm, LayerNorm, Linear, a frozen Linear, parameters that a block owns itself, and a
buffer.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine, UpdateResult
from aiprod_ds.engine.recompute import set_recompute
from aiprod_ds.errors import AiprodError
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import UnevenBlock, distance, is_same_state, optimized_state
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
GLOBAL_BATCH = 8
UPDATES = 8
ACCUMULATIONS = (1, 1, 2, 2, 4, 4, 1, 2)  # changes inside the live engine
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, weight_decay=0.1)

# Largest difference to the oracle in any of the losses and gradient norms (both of order 1), and the L2
# distance of the final fp32 parameters over the distance that training moved them. fp32: rounding of sums in
# another order, through 8 updates. 16 bit: gradients are rounded to 8 resp. 11 bits before they are summed
# over ranks and micro-batches; the oracle sums in one backward. Measured: fp32 1e-7, 1e-7, 2e-7; bf16 8e-4,
# 3e-3, 0.045; fp16 2e-4, 2e-3, 0.013; the 16-bit ones under ZeRO-3.
TOLERANCES = {"fp32": (1e-6, 1e-6, 2e-6), "bf16": (2e-3, 1e-2, 0.1), "fp16": (5e-4, 4e-3, 0.03)}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def measured() -> dict[str, Any]:
    results: list[dict[str, Any]] = run_on_ranks(measure_everything, ranks=2, timeout_seconds=600)
    assert results[0]["losses"] == results[1]["losses"], (
        "losses are reduced, so the ranks must report the same"
    )
    return results[0]


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_the_local_engine(measured: dict[str, Any], name: str) -> None:
    loss, norm, parameter = TOLERANCES[_precision(name)]
    case = measured["cases"][name]
    assert case["loss_difference"] <= loss
    assert case["norm_difference"] <= norm
    assert case["parameter_difference"] <= parameter
    assert case["loss_scales_equal"]
    assert case["steps"] == [UPDATES]


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_parameters(measured: dict[str, Any], name: str) -> None:
    assert measured["cases"][name]["movement"] > 0.1, "otherwise the comparison above shows nothing"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stages_1_and_2_agree_closely(measured: dict[str, Any], precision: str) -> None:
    # ZeRO-3 is left out: its replacement of F.linear rounds to 16 bit once more, before the bias is added.
    one, two = (measured["losses"][f"zero{stage}_{_suffix(precision)}"] for stage in (1, 2))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= TOLERANCES[precision][0] / 5


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bitwise(measured: dict[str, Any], name: str) -> None:
    case = measured["cases"][name]
    assert case["resumed_losses_equal"]
    assert case["resumed_states_equal"]
    assert case["resumed_module_equal"], "frozen parameters and buffers come from the file too"


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_is_a_file_of_each_rank_that_owns_something(
    measured: dict[str, Any], name: str
) -> None:
    ranks = [f"rank_{rank:05d}_of_00002{kind}.safetensors" for rank in range(2) for kind in (".moments", "")]
    files = ["engine.json", *ranks]
    assert measured["cases"][name]["saved"] == (files[:3] if "zero0" in name else files)


@pytest.mark.parametrize("name", NAMES)
def test_a_non_finite_gradient_on_one_rank_skips_the_update_on_all(
    measured: dict[str, Any], name: str
) -> None:
    case = measured["cases"][name]["overflow"]
    assert case["applied"] == [[False, False], [True, True]], "on both ranks: the bad update, then a good one"
    assert case["unchanged"]
    assert not case["finite_norm"]


@pytest.mark.parametrize("name", [name for name in NAMES if "fp16" in name])
def test_overflow_halves_the_scale_down_to_its_minimum_without_an_exception(
    measured: dict[str, Any], name: str
) -> None:
    assert measured["cases"][name]["overflow"]["scales"] == [4.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_close_leaves_nothing_alive(measured: dict[str, Any], name: str) -> None:
    case = measured["cases"][name]
    assert case["alive"] == []
    assert case["linear_restored"]


def test_an_engine_is_rebuilt_three_times_on_one_module(measured: dict[str, Any]) -> None:
    assert measured["rebuilt"]["alive"] == []
    assert measured["rebuilt"]["losses_fall"]
    assert measured["rebuilt"]["hooks"] == [0, 0, 0]


def test_batch_cannot_change_inside_a_window(measured: dict[str, Any]) -> None:
    assert "between updates, got 1 of 2" in measured["errors"]["window"]


def test_a_state_of_another_precision_is_refused(measured: dict[str, Any]) -> None:
    assert "same precision, got fp32 there, bf16 here" in measured["errors"]["precision"]


def test_a_state_without_the_file_of_a_rank_is_refused(measured: dict[str, Any]) -> None:
    assert "CheckpointError" in measured["errors"]["missing"]
    assert "A piece is missing" in measured["errors"]["missing"]


def _precision(name: str) -> str:
    return name.split("_")[1]


# Below runs on the ranks.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, 8, 3, padding=1)
        self.groups = nn.GroupNorm(2, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.blocks = nn.ModuleList(UnevenBlock(8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(8))

    def forward(self, video: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.groups(self.convolution(video))).movedim(1, -1)
        hidden = self.frozen(self.norm(hidden)) + self.shift.to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).movedim(-1, 1)


def measure_everything() -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    oracles = {precision: _oracle(precision) for precision in TOLERANCES}
    cases: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    for path in FILES:
        cases[path.stem], losses[path.stem] = _measure(path, oracles[_precision(path.stem)])
    return {"cases": cases, "losses": losses, "rebuilt": _measure_rebuilding(), "errors": _measure_errors()}


def _oracle(precision: str) -> dict[str, Any]:
    module = _module(0)
    settings = _settings(FILES[NAMES.index(f"zero2_{_suffix(precision)}")])
    engine = LocalEngine(
        module, decay_groups(module), optimizer=OPTIMIZER, settings=settings, micro_batch_size=GLOBAL_BATCH, accumulation=1  # noqa: E501
    )  # fmt: skip
    return {"records": _train(engine, 0, UPDATES), "module": engine.module_state()}


def _measure(path: Path, oracle: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    engine = _engine(path, seed=0)
    start = engine.module_state()
    first = _train(engine, 0, UPDATES // 2)
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    write_engine(folder, engine)
    records = first + _train(engine, UPDATES // 2, UPDATES)
    states, module = optimized_state(engine), engine.module_state()
    references = [
        weakref.ref(part)
        for part in (engine._engine, engine._engine.optimizer, engine._engine.basic_optimizer)
    ]
    engine.close()
    del engine
    gc.collect()
    alive = [index for index, reference in enumerate(references) if reference() is not None]

    resumed = _engine(path, seed=1)
    read_engine(folder, resumed)
    resumed_records = _train(resumed, UPDATES // 2, UPDATES)
    resumed_states, resumed_module = optimized_state(resumed), resumed.module_state()
    overflow = _measure_overflow(resumed)
    resumed.close()
    saved = sorted(entry.name for entry in folder.iterdir())
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(folder)
    case = {
        "loss_difference": max(abs(a[0] - b[0]) for a, b in zip(records, oracle["records"], strict=True)),
        "norm_difference": max(abs(a[1] - b[1]) for a, b in zip(records, oracle["records"], strict=True)),
        "loss_scales_equal": [record[2] for record in records] == [record[2] for record in oracle["records"]],
        "parameter_difference": distance(module, oracle["module"]) / distance(module, start)
        if dist.is_main()
        else 0.0,
        "movement": distance(module, start) if dist.is_main() else 0.0,
        "steps": sorted({state["step"] for state in states.values()}),
        "resumed_losses_equal": resumed_records == records[UPDATES // 2 :],
        "resumed_states_equal": is_same_state(states, resumed_states),
        "resumed_module_equal": all(torch.equal(module[key], resumed_module[key]) for key in module),
        "overflow": overflow,
        "saved": saved,
        "alive": alive,
        "linear_restored": torch.nn.functional.linear is torch._C._nn.linear,
    }
    return case, [record[0] for record in records]


def _measure_overflow(engine: Any) -> dict[str, Any]:
    engine.set_batch(micro_batch_size=1, accumulation=1)
    before = optimized_state(engine)
    bad = _poisoned_update(engine)
    after = optimized_state(engine)
    good = _update(engine, _batch(0)[:1])
    scaler = getattr(engine._engine.optimizer, "loss_scaler", None)
    scales: list[float] = []
    if engine.compute_dtype == torch.float16:
        scaler.cur_scale = 4.0
        scales = [_poisoned_update(engine).loss_scale for _ in range(5)]
    return {
        "applied": [dist.gather_objects(bad.applied), dist.gather_objects(good.applied)],
        "finite_norm": bool(torch.isfinite(torch.as_tensor(bad.gradient_norm))),
        "unchanged": is_same_state(before, after),
        "scales": scales,
    }


def _measure_rebuilding() -> dict[str, Any]:
    module, references, losses, hooks = _module(0), [], [], []
    path = FILES[NAMES.index("zero3_fp32")]
    for _ in range(3):
        engine = _engine(path, module=module)
        losses += [record[0] for record in _train(engine, 0, 2)]
        references += [weakref.ref(engine._engine), weakref.ref(engine._engine.optimizer)]
        engine.close()
        engine.close()  # again, on purpose
        hooks.append(
            sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
        )
        del engine
        gc.collect()
    return {
        "alive": [index for index, reference in enumerate(references) if reference() is not None],
        "losses_fall": losses[4] < losses[2] < losses[0],
        "hooks": hooks,
    }


def _measure_errors() -> dict[str, str]:
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    engine = _engine(FILES[NAMES.index("zero1_fp32")], seed=0)
    engine.set_batch(micro_batch_size=1, accumulation=2)
    _backward(engine, _batch(0)[:1])
    assert engine.step() is None
    window = _message(lambda: engine.set_batch(micro_batch_size=1, accumulation=1))
    _backward(engine, _batch(0)[:1])
    engine.step()
    write_engine(folder, engine)
    engine.close()
    engine = _engine(FILES[NAMES.index("zero1_bf16")], seed=0)
    precision = _message(lambda: read_engine(folder, engine))
    engine.close()
    dist.barrier()
    if dist.is_main():
        (folder / "rank_00001_of_00002.safetensors").unlink()
    dist.barrier()
    engine = _engine(FILES[NAMES.index("zero1_fp32")], seed=0)
    missing = _message(lambda: read_engine(folder, engine))
    engine.close()
    return {"window": window, "precision": precision, "missing": missing}


def _message(call: Any) -> str:
    try:
        call()
    except AiprodError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _engine(path: Path, *, seed: int = 0, module: nn.Module | None = None) -> Any:
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine

    built = _module(seed) if module is None else module
    settings = _settings(path)
    if settings.activation_checkpointing:
        set_recompute(built, enabled=True)
    return DeepSpeedEngine(
        built,
        decay_groups(built),
        optimizer=OPTIMIZER,
        settings=settings,
        micro_batch_size=GLOBAL_BATCH // dist.world_size(),
        accumulation=1,
    )


def _settings(path: Path) -> DeepSpeedSettings:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = (
            0  # the module is smaller than the usual threshold
        )
    if "fp16" in values:
        # A window so short that the scale doubles in the run.
        values["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 1}
    return parse_deepspeed_settings(values, path.name)


def _module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def _train(engine: Engine, first: int, last: int) -> list[list[float]]:
    """Returns mean loss, gradient norm and loss scale of every update in [first, last)."""
    records = []
    for update in range(first, last):
        accumulation = ACCUMULATIONS[update] if engine.world_size > 1 else 1
        micro_batch_size = GLOBAL_BATCH // engine.world_size // accumulation
        engine.set_batch(micro_batch_size=micro_batch_size, accumulation=accumulation)
        engine.set_learning_rate(1e-2 / (1 + update))
        losses = []
        for micro_batch in _batch(update).chunk(engine.world_size)[engine.rank].split(micro_batch_size):
            losses.append(_backward(engine, micro_batch))
            result = engine.step()
        assert result is not None
        assert result.applied
        mean = torch.stack(losses).mean()
        mean = dist.reduce_mean(mean) if engine.world_size > 1 else mean
        records.append([mean.item(), float(result.gradient_norm), result.loss_scale])
    return records


def _batch(update: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 3, 2, 4, 4, generator=torch.Generator().manual_seed(update))


def _backward(engine: Engine, video: Tensor) -> Tensor:
    loss = (engine(video.to(engine.compute_dtype)).float() - video * 0.5).pow(2).mean()
    engine.backward(loss)
    return loss.detach()


def _update(engine: Engine, video: Tensor) -> UpdateResult:
    _backward(engine, video)
    result = engine.step()
    assert result is not None
    return result


def _poisoned_update(engine: Engine) -> UpdateResult:
    """One update whose gradient is not finite on rank 1 only."""
    loss = engine(_batch(0)[:1].to(engine.compute_dtype)).float().mean()
    engine.backward(loss * (float("nan") if engine.rank == 1 else 1.0))
    result = engine.step()
    assert result is not None
    return result


def _suffix(precision: str) -> str:
    return "fp16_v100" if precision == "fp16" else precision
