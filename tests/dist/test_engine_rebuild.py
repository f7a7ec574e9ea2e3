"""What happens to an engine and its module where the trainable set changes: values are carried, written, and trained on.

One launch runs all cases on two ranks and returns measurements; the tests below only read them. The oracle is `LocalEngine` with
the whole batch on one process.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.run import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.carried import CarriedValues
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine, ParameterGroup
from aiprod_ds.errors import AiprodError
from aiprod_ds.testing.dist import run_on_ranks

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
RANKS = 2
GLOBAL_BATCH = 4
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, weight_decay=0.1)

# L2 distance of the fp32 parameters to the oracle's over the distance that the updates after writing moved them, as in
# tests/dist/test_engine.py, which says why.
WRITING_TOLERANCES = {"fp32": 2e-6, "bf16": 0.1, "fp16": 0.03}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def measured() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = run_on_ranks(measure_everything, ranks=RANKS, timeout_seconds=600)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_values_are_written_and_read_on_every_rank(measured: list[dict[str, Any]], name: str) -> None:
    for rank in measured:
        assert rank["writing"][name]["read"] == [], "parameters that were not read as written"
        assert rank["writing"][name]["weights"] == [], "weights that are not the cast of what was written"


@pytest.mark.parametrize("name", NAMES)
def test_writing_sets_masters_and_leaves_the_optimizer_alone(measured: list[dict[str, Any]], name: str) -> None:
    case = measured[0]["writing"][name]
    assert case["masters"] == []
    assert case["moments"] == []


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_written_values_as_in_the_local_engine(measured: list[dict[str, Any]], name: str) -> None:
    assert measured[0]["writing"][name]["difference"] <= WRITING_TOLERANCES[_precision(name)]


def test_a_rank_carries_its_own_part_alone(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert rank["carried"]["elements"] == rank["carried"]["own"]
        assert rank["carried"]["equal"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_values_that_do_not_fit_are_refused(measured: list[dict[str, Any]], stage: int) -> None:
    messages = measured[1]["errors"][stage]
    assert "write_values: must name a parameter of the module, got 'nothing'" in messages["name"]
    assert "write_values: blocks.0.up.bias must have the shape [33], got [1]" in messages["shape"]
    assert "read_value: must name a parameter of the module, got 'nothing'" in messages["read"]


def _precision(name: str) -> str:
    return name.split("_")[1]


# Below runs on the ranks.


class Block(nn.Module):
    """33 is odd, so two ranks share it unevenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 33)
        self.down = nn.Linear(33, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(hidden * self.scale)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.frozen = nn.Linear(8, 33).requires_grad_(False)
        self.back = nn.Linear(33, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.back(self.frozen(self.convolution(image).movedim(1, -1)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).movedim(-1, 1)


def measure_everything() -> dict[str, Any]:
    import cpuinfo
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # a second for every offloaded optimizer
    oracles = {precision: _writing_oracle(precision) for precision in WRITING_TOLERANCES}
    return {
        "writing": {path.stem: _measure_writing(path, oracles[_precision(path.stem)]) for path in FILES},
        "carried": _measure_carrying(),
        "errors": [_measure_errors(stage) for stage in range(4)],
    }


def _writing_oracle(precision: str) -> dict[str, Tensor]:
    module = _net(0)
    settings = _settings(FILES[NAMES.index(f"zero2_{'fp16_v100' if precision == 'fp16' else precision}")])
    engine = LocalEngine(
        module, _groups(module), optimizer=OPTIMIZER, settings=settings, micro_batch_size=GLOBAL_BATCH, accumulation=1
    )  # fmt: skip
    _update_net(engine, 0)
    engine.write_values(_written().items())
    for update in (1, 2):
        _update_net(engine, update)
    return engine.module_state()


def _measure_writing(path: Path, oracle: dict[str, Tensor]) -> dict[str, Any]:
    written = _written()
    with _engine(_net(0), path) as engine:
        trained = {name for group in _groups(engine.module) for name in group.names}
        _update_net(engine, 0)
        before = {state.name: state for state in engine.parameter_states()}
        engine.write_values(iter(written.items()))
        weights = {name: value.to(engine.compute_dtype) for name, value in written.items()}
        expected = {name: written[name] if name in trained else weights[name].float() for name in written}
        found = {
            "read": [name for name, value in expected.items() if not torch.equal(engine.read_value(name), value)],
            "weights": [name for name, value in _weights(engine).items() if not torch.equal(value, weights[name])],
        }
        if dist.is_main():
            after = {state.name: state for state in engine.parameter_states()}
            found["masters"] = [name for name in after if not torch.equal(after[name].value, written[name])]
            found["moments"] = [name for name in after if not _same_moments(before[name], after[name])]
        else:
            list(engine.parameter_states())
        for update in (1, 2):
            _update_net(engine, update)
        state = engine.module_state()
    if dist.is_main():
        found["difference"] = _distance(state, oracle) / _distance(written, oracle)
    return found


def _same_moments(first: Any, second: Any) -> bool:
    return first.step == second.step == 1 and all(
        torch.equal(first.optimizer[key], second.optimizer[key]) for key in ("exp_avg", "exp_avg_sq")
    )


def _measure_carrying() -> dict[str, Any]:
    carried, written = CarriedValues(), _written()
    for name, value in written.items():
        carried.add(name, value)
    returned = dict(carried.whole())
    return {
        "elements": sum(part.numel() for _, part in carried._parts.values()),
        "own": sum(-(-value.numel() // RANKS) for value in written.values()),
        "equal": list(returned) == list(written) and all(torch.equal(value, written[name]) for name, value in returned.items()),
    }


def _measure_errors(stage: int) -> dict[str, str]:
    with _engine(_net(0), FILES[NAMES.index(f"zero{stage}_fp32")]) as engine:
        return {
            "name": _message(lambda: engine.write_values([("nothing", torch.zeros(1))])),
            "shape": _message(lambda: engine.write_values([("blocks.0.up.bias", torch.zeros(1))])),
            "read": _message(lambda: engine.read_value("nothing")),
        }


def _message(call: Any) -> str:
    try:
        call()
    except AiprodError as error:
        return str(error)
    return "no error"


@contextmanager
def _engine(module: nn.Module, path: Path) -> Iterator[Any]:
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(
        module,
        _groups(module),
        optimizer=OPTIMIZER,
        settings=_settings(path),
        micro_batch_size=GLOBAL_BATCH // RANKS,
        accumulation=1,
    )
    yield engine  # after an error no collective: the launcher ends the ranks
    engine.close()


def _settings(path: Path) -> DeepSpeedSettings:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 40  # biases stay gathered, matrices do not
    if "fp16" in values:
        values["fp16"] |= {"initial_scale_power": 8}
    return parse_deepspeed_settings(values, path.name)


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def _groups(module: nn.Module) -> list[ParameterGroup]:
    trained = [(name, len(_shape(parameter)) > 1) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return [
        ParameterGroup(names=tuple(name for name, is_matrix in trained if is_matrix), is_decayed=True),
        ParameterGroup(names=tuple(name for name, is_matrix in trained if not is_matrix), is_decayed=False),
    ]


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _written() -> dict[str, Tensor]:
    """Returns other values than the module starts from, in the order of another module than the engine's groups."""
    generator = torch.Generator().manual_seed(7)
    return {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in _net(0).named_parameters()}


def _weights(engine: Any) -> dict[str, Tensor]:
    """Returns what the module computes with, whole and on every rank."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def _update_net(engine: Engine, update: int) -> None:
    engine.set_learning_rate(1e-2)
    images = torch.randn(GLOBAL_BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(update))
    own = images.chunk(engine.world_size)[engine.rank]
    engine.backward((engine(own.to(engine.compute_dtype)).float() - own).pow(2).mean())
    result = engine.step()
    assert result is not None
    assert result.applied


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Returns the L2 norm of the difference over the whole model."""
    assert first.keys() == second.keys()
    return torch.cat([(first[key].float() - second[key].float()).flatten() for key in first]).norm().item()
