"""A new engine on the same module where the trainable set changes: adapters to all weights, back, and to
another rank.

Values are carried from one engine to the next and written into it, its function and its updates are those of
the local engine, and nothing of the old engine stays in memory. One call runs all cases on two ranks and
returns measurements; the tests below only read them. The oracle is `LocalEngine` with the whole batch on one
process.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.model import LoraConfig
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import Engine
from aiprod_ds.engine.weight_handoff import WeightHandoff
from aiprod_ds.errors import AiprodError
from aiprod_ds.models.families.ltx import LTXVideo
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.testing.engines import UnevenBlock, deepspeed_engine, distance, is_same_state, optimized_state
from aiprod_ds.train.engines import decay_groups
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
RANKS = 2
GLOBAL_BATCH = 4
# Adam divides by the size of a gradient: the larger epsilon keeps rounding of next to none, as A has while B
# is 0, small.
OPTIMIZER = OptimizerConfig(gradient_clip_norm=0.5, weight_decay=0.1, epsilon=1e-6)

# L2 distance of the fp32 parameters to the oracle's over the distance that the updates after writing moved
# them, as in tests/distributed/test_engine.py, which says why.
WRITING_TOLERANCES = {"fp32": 2e-6, "bf16": 0.1, "fp16": 0.03}

# Every stage once, both precisions twice; the others in `make test-all`.
FEW = {"zero0_bf16", "zero1_fp32", "zero2_bf16", "zero3_fp32"}
CHAINS = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive)
    for name in NAMES
    if name.split("_", 1)[1] in ("fp32", "bf16")
]
CHANGES = ("lora to full", "full to lora", "lora to lora")
LORA = LoraConfig(rank=4, alpha=6.0, targets=("to_q", "to_k", "to_v", "to_out.0", "net.2"))
# Largest relative L2 difference of the answers before and after, and distance to the oracle's parameters
# after two updates, as above. fp32: (W + B A) x against W x + B (A x). bf16: weights are rounded after the
# merge, and W and B A were rounded before. Measured: fp32 2e-7, 1.4e-6; bf16 5e-3, 0.015, and 0.05 where
# ZeRO-3 trains A and B from B = 0.
CHANGE_TOLERANCES = {"fp32": (1e-6, 1e-5), "bf16": (2e-2, 0.15)}

WARM_UPS = 2  # rebuilds in which torch and DeepSpeed take what they keep for good
REBUILDS = (3, pytest.param(10, marks=pytest.mark.exhaustive))  # the first shows what one leaves behind
REBUILT = [(f"zero{stage}_bf16", kind) for stage in range(4) for kind in ("plain", "lora")] + [
    ("zero3_bf16_offload", "plain")
]
# Resident memory after the last of them over that after the warm-ups. Masters and moments are 9 MiB or more
# on each rank where there are no adapters. Measured: 0.93 under ZeRO-3, which in another run took 3.1 MiB in
# the first 14 of 50 rebuilds and none after them; otherwise 0.02.
MAX_GROWTH_MIB = 3.0
# Options of mallopt(3): glibc otherwise keeps what threads have freed for itself, some MiB in some rebuilds
# and not in others.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
RETURN_FREED_MEMORY = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 65536}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def measured(wanted: Callable[[str], list[str]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = run_on_ranks(
        measure_everything, ranks=RANKS, arguments={"chains": wanted("chain")}, timeout_seconds=600
    )
    return results


@pytest.fixture(scope="module", params=REBUILDS)
def rebuilt(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = run_on_ranks(
        measure_rebuilding,
        ranks=RANKS,
        arguments={"rebuilds": request.param},
        timeout_seconds=600,
    )
    return results


@pytest.mark.parametrize("name", NAMES)
def test_values_are_written_and_read_on_every_rank(measured: list[dict[str, Any]], name: str) -> None:
    for rank in measured:
        assert rank["writing"][name]["read"] == [], "parameters that were not read as written"
        assert rank["writing"][name]["weights"] == [], "weights that are not the cast of what was written"


@pytest.mark.parametrize("name", NAMES)
def test_writing_sets_masters_and_leaves_the_optimizer_alone(
    measured: list[dict[str, Any]], name: str
) -> None:
    case = measured[0]["writing"][name]
    assert case["masters"] == []
    assert case["moments"] == []


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_from_written_values_as_in_the_local_engine(
    measured: list[dict[str, Any]], name: str
) -> None:
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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_change_of_what_is_trained_keeps_the_function(
    measured: list[dict[str, Any]], chain: str, change: str
) -> None:
    case = measured[0]["chains"][chain][change]
    assert case["weights"] == [], "weights that are not the cast of what was carried"
    assert case["answer"] <= CHANGE_TOLERANCES[_precision(chain)][0]
    assert case["answer_of_local_engine"] <= 1e-6, "the same weights in the same precision"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("chain", CHAINS)
def test_after_a_change_training_equals_the_local_engine(
    measured: list[dict[str, Any]], chain: str, change: str
) -> None:
    case = measured[0]["chains"][chain][change]
    assert case["updates"] <= CHANGE_TOLERANCES[_precision(chain)][1]
    assert case["frozen"] == [], "frozen weights that moved"


@pytest.mark.parametrize("chain", CHAINS)
def test_a_rebuilt_engine_is_resumed_bitwise_in_a_new_module(
    measured: list[dict[str, Any]], chain: str
) -> None:
    assert measured[0]["chains"][chain]["resumed"] == {"states": True, "module": True}


@pytest.mark.parametrize(("name", "kind"), REBUILT)
def test_rebuilding_leaves_nothing_of_the_old_engine(
    rebuilt: list[dict[str, Any]], name: str, kind: str
) -> None:
    for rank in rebuilt:
        case = rank[f"{name} {kind}"]
        assert case["alive"] == 0
        assert len(set(case["tensors"])) == 1, f"tensors after each rebuild: {case['tensors']}"
        # Partitions and flat buffers end in padding.
        assert set(case["bytes_left"]) <= set(range(case["bytes_of_module"], case["bytes_of_module"] + 1024))


@pytest.mark.parametrize(("name", "kind"), REBUILT)
def test_memory_of_the_process_goes_back(rebuilt: list[dict[str, Any]], name: str, kind: str) -> None:
    for rank in rebuilt:
        resident = rank[f"{name} {kind}"]["resident_mib"]
        assert resident[-1] - resident[0] <= MAX_GROWTH_MIB, f"after each rebuild: {resident}"


def _precision(name: str) -> str:
    return name.split("_")[1]


# Below runs on the ranks.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.frozen = nn.Linear(8, 33).requires_grad_(False)
        self.back = nn.Linear(33, 8)
        self.blocks = nn.ModuleList(UnevenBlock(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.back(self.frozen(self.convolution(image).movedim(1, -1)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden).movedim(-1, 1)


class Denoiser(nn.Module):
    """A transformer inside the module that is trained, as in the diffusion trainer."""

    def __init__(self, *, heads: int = 2, head_width: int = 12) -> None:
        super().__init__()
        from diffusers import LTXVideoTransformer3DModel

        width = {
            "num_attention_heads": heads,
            "attention_head_dim": head_width,
            "cross_attention_dim": heads * head_width,
        }
        self.transformer = LTXVideoTransformer3DModel(**LTXVideo.tiny_config() | width)

    def forward(self, latents: Tensor, text: Tensor, level: Tensor) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=1000.0 * level,
            encoder_attention_mask=None,
            num_frames=2,
            height=2,
            width=2,
            rope_interpolation_scale=(1 / 3, 32, 32),
            return_dict=False,
        )[0]
        return output


def measure_everything(chains: Sequence[str]) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    oracles = {precision: _writing_oracle(precision) for precision in WRITING_TOLERANCES}
    return {
        "writing": {path.stem: _measure_writing(path, oracles[_precision(path.stem)]) for path in FILES},
        "carried": _measure_carrying(),
        "errors": [_measure_errors(stage) for stage in range(4)],
        "chains": {name: _measure_chain(FILES[NAMES.index(name)]) for name in chains},
    }


def measure_rebuilding(rebuilds: int) -> dict[str, Any]:
    for option, value in RETURN_FREED_MEMORY.items():
        assert ctypes.CDLL("libc.so.6").mallopt(option, value) == 1
    with _engine(_add_lora(_denoiser(0), rank=4), FILES[0]):
        # every engine that closes collects garbage, and all that is imported would be looked through again
        gc.freeze()
    return {
        f"{name} {kind}": _measure_rebuilding(FILES[NAMES.index(name)], kind, rebuilds)
        for name, kind in REBUILT
    }


def _writing_oracle(precision: str) -> dict[str, Tensor]:
    module = _net(0)
    settings = _settings(FILES[NAMES.index(f"zero2_{'fp16_v100' if precision == 'fp16' else precision}")])
    engine = LocalEngine(
        module, decay_groups(module), optimizer=OPTIMIZER, settings=settings, micro_batch_size=GLOBAL_BATCH, accumulation=1  # noqa: E501
    )  # fmt: skip
    _update_net(engine, 0)
    engine.write_values(_written().items())
    for update in (1, 2):
        _update_net(engine, update)
    return engine.module_state()


def _measure_writing(path: Path, oracle: dict[str, Tensor]) -> dict[str, Any]:
    written, net = _written(), _net(0)
    trained = {name for group in decay_groups(net) for name in group.names}
    with _engine(net, path) as engine:
        _update_net(engine, 0)
        before = {state.name: state for state in engine.parameter_states()}
        engine.write_values(iter(written.items()))
        weights = {name: value.to(engine.compute_dtype) for name, value in written.items()}
        expected = {name: written[name] if name in trained else weights[name].float() for name in written}
        found = {
            "read": [
                name for name, value in expected.items() if not torch.equal(engine.read_value(name), value)
            ],
            "weights": [
                name for name, value in _weights(engine).items() if not _is_same(value, weights[name])
            ],
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
        found["difference"] = distance(state, oracle) / distance(written, oracle)
    return found


def _same_moments(first: Any, second: Any) -> bool:
    return first.step == second.step == 1 and all(
        torch.equal(first.optimizer[key], second.optimizer[key]) for key in ("exp_avg", "exp_avg_sq")
    )


def _measure_carrying() -> dict[str, Any]:
    carried, written = WeightHandoff(), _written()
    for name, value in written.items():
        carried.add(name, value)
    returned = dict(carried.whole())
    return {
        "elements": sum(part.numel() for _, part in carried._parts.values()),
        "own": sum(-(-value.numel() // RANKS) for value in written.values()),
        "equal": list(returned) == list(written)
        and all(torch.equal(value, written[name]) for name, value in returned.items()),
    }


def _measure_chain(path: Path) -> dict[str, Any]:
    """Goes through every change on one module, with an engine before and after each."""
    module = _add_lora(_denoiser(0), rank=4)
    found: dict[str, Any] = {}
    with _engine(module, path) as engine:
        _update_denoiser(engine, 0, 2)
        before, carried = _answer(engine), _merged(engine)
    for change, rank in zip(CHANGES, (None, 2, 3), strict=True):
        change_module = functools.partial(_set_lora, rank=rank)
        change_module(module)
        with _engine(module, path) as engine:
            engine.write_values(_renamed(engine, carried))
            found[change] = _compare(
                engine, before, dict(_renamed(engine, carried)), change_module(_denoiser(0)), path
            )
            before, carried = _answer(engine), _merged(engine)
            if rank is None:
                found["resumed"] = _measure_resuming(engine, path)
    return found


def _compare(
    engine: Any, before: Tensor, values: dict[str, Tensor], module: nn.Module, path: Path
) -> dict[str, Any]:
    """Compares an engine that was given `values` with what answered before it, and through two updates with
    the local engine."""
    local = LocalEngine(
        module, decay_groups(module), optimizer=OPTIMIZER, settings=_settings(path), micro_batch_size=GLOBAL_BATCH, accumulation=1  # noqa: E501
    )  # fmt: skip
    local.write_values(values.items())
    weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    start, answer = local.module_state(), _answer(engine)
    found = {
        "weights": [name for name, value in _weights(engine).items() if not _is_same(value, weights[name])],
        "answer": _relative_difference(answer, before),
        "answer_of_local_engine": _relative_difference(answer, _answer(local)),
    }
    for each in (engine, local):
        _update_denoiser(each, 2, 2)
    moved = _weights(engine)
    found["frozen"] = [name for name in frozen if not torch.equal(moved[name], weights[name])]
    state, ends = engine.module_state(), local.module_state()
    found["updates"] = distance(state, ends) / distance(start, ends) if dist.is_main() else 0.0
    return found


def _measure_resuming(engine: Any, path: Path) -> dict[str, bool]:
    """Compares one update more of an engine that was rebuilt with the same of one in a module that never
    was."""
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    write_engine(folder, engine)
    _update_denoiser(engine, 4, 1)
    states = optimized_state(engine), engine.module_state()
    with _engine(_denoiser(1), path) as resumed:
        read_engine(folder, resumed)
        _update_denoiser(resumed, 4, 1)
        again = optimized_state(resumed), resumed.module_state()
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(folder)
    return {
        "states": is_same_state(states[0], again[0]),
        "module": all(torch.equal(value, again[1][name]) for name, value in states[1].items()),
    }


def _measure_rebuilding(path: Path, kind: str, rebuilds: int) -> dict[str, Any]:
    """Builds engines on one module, with new adapters for each if there are any, and looks at what is left of
    them."""
    gc.collect()
    references, tensors, bytes_left, resident, before = [], [], [], [], _live_bytes()
    module = _denoiser(0, heads=4, head_width=64)
    for _ in range(WARM_UPS + rebuilds):
        _set_lora(module, rank=4 if kind == "lora" else None)
        with _engine(module, path) as engine:
            _update_denoiser(engine, 0, 2)
            _answer(engine)  # after which ZeRO-3 has all weights gathered
            inside = engine._engine
            references += [
                weakref.ref(part) for part in (engine, inside, inside.optimizer, inside.basic_optimizer)
            ]
        del engine, inside
        gc.collect()
        tensors.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
        bytes_left.append(_live_bytes() - before)
        resident.append(_resident_mib())
    return {
        "alive": sum(reference() is not None for reference in references),
        "tensors": tensors[WARM_UPS - 1 :],
        "bytes_left": bytes_left[WARM_UPS - 1 :],
        "bytes_of_module": sum(
            getattr(parameter, "ds_tensor", parameter).nbytes for parameter in module.parameters()
        ),
        "resident_mib": resident[WARM_UPS - 1 :],
    }


def _live_bytes() -> int:
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
        }.values()
    )


def _resident_mib() -> float:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 2**20


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


def _engine(module: nn.Module, path: Path) -> AbstractContextManager[Any]:
    return deepspeed_engine(
        module, optimizer=OPTIMIZER, settings=_settings(path), micro_batch_size=GLOBAL_BATCH // RANKS
    )


def _settings(path: Path) -> DeepSpeedSettings:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = (
            40  # biases stay gathered, matrices do not
        )
    if "fp16" in values:
        values["fp16"] |= {"initial_scale_power": 8}
    return parse_deepspeed_settings(values, path.name)


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def _denoiser(seed: int, **width: int) -> nn.Module:
    torch.manual_seed(seed)
    return Denoiser(**width)


def _set_lora(module: nn.Module, *, rank: int | None) -> nn.Module:
    """Takes adapters away without merging them, and adds new ones unless `rank` is None."""
    _remove_lora(module)
    return module if rank is None else _add_lora(module, rank=rank)


def _add_lora(module: nn.Module, *, rank: int) -> nn.Module:
    from aiprod_ds.models.lora import add_lora

    add_lora(
        module.transformer, LORA.model_copy(update={"rank": rank}), allowed=LTXVideo.lora_targets, seed=rank
    )
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = (
                parameter.data.float()
            )  # PEFT takes the type that the last engine has left, others may not
    return module


def _remove_lora(module: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())
    if layers:
        del module.transformer.peft_config
    module.requires_grad_(True)


def _merged(engine: Any) -> WeightHandoff:
    """Returns the values of the plain module that computes the same as the engine's."""
    carried, names = WeightHandoff(), _names(engine)
    for name in names:
        if ".lora_" in name:
            continue
        value, layer = engine.read_value(name), name.removesuffix(".base_layer.weight")
        if f"{layer}.lora_A.default.weight" in names:
            up, down = (engine.read_value(f"{layer}.lora_{part}.default.weight") for part in "BA")
            value = value + LORA.alpha / len(down) * (up @ down)
        carried.add(name.replace(".base_layer.", "."), value)
    return carried


def _names(engine: Engine) -> list[str]:
    """Returns the names of all parameters, trained and frozen."""
    facts = engine.capture().facts
    return [*facts.names("master"), *facts.names("frozen")]


def _renamed(engine: Engine, carried: WeightHandoff) -> Iterator[tuple[str, Tensor]]:
    """Yields what was carried by the names in a module that may have adapters."""
    names = {name.replace(".base_layer.", "."): name for name in _names(engine)}
    for name, value in carried.whole():
        yield names[name], value


def _written() -> dict[str, Tensor]:
    """Returns other values than the module starts from, in the order of another module than the engine's
    groups."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in _net(0).named_parameters()
    }


def _weights(engine: Any) -> dict[str, Tensor]:
    """Returns what the module computes with, whole and on every rank."""
    import deepspeed

    found, layouts = {}, engine._flat.layouts
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach().clone()
        members = layouts[name].members if name in layouts else ()
        found |= {each.name: whole[each.start :][: each.numel].view(each.shape) for each in members}
        if not members:
            found[name] = whole
    return found


def _update_net(engine: Engine, update: int) -> None:
    engine.set_learning_rate(1e-2)
    images = torch.randn(GLOBAL_BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(update))
    own = images.chunk(engine.world_size)[engine.rank]
    engine.backward((engine(own.to(engine.compute_dtype)).float() - own).pow(2).mean())
    result = engine.step()
    assert result is not None
    assert result.applied


def _update_denoiser(engine: Engine, first: int, updates: int) -> None:
    engine.set_learning_rate(1e-2)
    for update in range(first, first + updates):
        latents, text, level = (part.chunk(engine.world_size)[engine.rank] for part in _batch(update))
        output = engine(latents.to(engine.compute_dtype), text.to(engine.compute_dtype), level)
        engine.backward((output.float() - latents).pow(2).mean())
        result = engine.step()
        assert result is not None
        assert result.applied


def _batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    latents, text = (
        torch.randn(GLOBAL_BATCH, 8, 4, generator=generator),
        torch.randn(GLOBAL_BATCH, 6, 16, generator=generator),
    )
    return latents, text, torch.rand(GLOBAL_BATCH, 1, generator=generator).expand(-1, 8)


def _answer(engine: Any) -> Tensor:
    latents, text, level = _batch(100)
    with torch.no_grad():
        output: Tensor = engine(
            latents.to(engine.compute_dtype), text.to(engine.compute_dtype), level
        ).float()
    return output


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
