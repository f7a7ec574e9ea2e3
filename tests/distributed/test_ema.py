"""The average of the weights and the clip norm of each update on two ranks, for every settings file that
ships.

One call runs all cases on both ranks and returns measurements; the tests below only read them. The oracle
of the average is the same recursion on whole parameters, from the masters that rank 0 gathers after every
update. Under ZeRO-3 one part of the parameters is partitioned and the other, below the persistence threshold,
stays gathered; masters lie in several sub-groups.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.optim import AdaptiveClipConfig, EmaConfig, OptimizerConfig
from aiprod_ds.engine import dist
from aiprod_ds.engine.protocol import Engine, ParameterGroup, UpdateResult
from aiprod_ds.optim.adaptive_clip import AdaptiveClip
from aiprod_ds.optim.ema import Ema, ema_decay
from aiprod_ds.testing.dist import run_on_ranks
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

FILES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [path.stem for path in FILES]
BATCH = 8
UPDATES = 4
CONFIG = EmaConfig(half_life_samples=2 * BATCH, ramp=0.8)
CLIP = AdaptiveClipConfig(smoothing=0.9, deviations=1.0, warmup_updates=1)
CLIP_NORMS = (0.01, None, 0.02)

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def measured() -> dict[str, list[dict[str, Any]]]:
    """What each rank measured, by case."""
    ranks = run_on_ranks(measure_everything, ranks=2, timeout_seconds=600)
    return {name: [cases[name] for cases in ranks] for name in ranks[0]}


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_the_plain_one_of_the_gathered_masters(measured: Any, name: str) -> None:
    assert measured[name][0]["average_is_plain"] == [True] * UPDATES, "bitwise, after every update"
    assert measured[name][0]["average_differs_from_masters"]


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_sharded_as_the_masters_are(measured: Any, name: str) -> None:
    elements = [case["elements"] for case in measured[name]]
    total, padding = measured[name][0]["total_elements"], 64
    if "zero0" in name:
        assert elements == [total, total]
    else:
        assert total <= sum(elements) <= total + padding
        assert max(elements) <= total / 2 + padding


@pytest.mark.parametrize("name", NAMES)
def test_while_swapped_the_weights_are_the_average_in_the_compute_type(measured: Any, name: str) -> None:
    for case in measured[name]:
        assert case["weights_are_average"]
        assert case["forward_is_plain"], "bitwise a plain module's with the average, through the same kernels"
        assert case["forward_moved"] > 0.1, "otherwise the line above shows nothing"


@pytest.mark.parametrize("name", NAMES)
def test_swapping_back_restores_everything_bitwise(measured: Any, name: str) -> None:
    for case in measured[name]:
        assert case["restored"] == {"states": True, "weights": True, "forward": True}
        assert case["next_updates_equal"], "those of an engine that never swapped"


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_are_bitwise(measured: Any, name: str) -> None:
    for case in measured[name]:
        assert case["loaded_average_equal"]
        assert case["next_average_equal"]


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_file_per_rank_or_one_for_all(measured: Any, name: str) -> None:
    ranks = [f"rank_{rank:05d}_of_00002{kind}.safetensors" for rank in range(2) for kind in (".moments", "")]
    files = ["engine.json", *ranks]
    assert measured[name][0]["files"] == (files[:3] if "zero0" in name else files)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_norm_holds_for_the_next_update(measured: Any, name: str) -> None:
    """The first moment of a fresh Adam is 0.1 of the gradient that it saw; 1e-3: fp32 sums, 1e-6 added to the
    norm."""
    for norm, seen, clip_norm in zip(*measured[name][0]["clipping"], CLIP_NORMS, strict=True):
        assert norm > 0.1, "reported is the norm before clipping"
        assert seen == pytest.approx(norm if clip_norm is None else clip_norm, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_reach_the_same_adaptive_limits(measured: Any, name: str) -> None:
    first, second = (case["limits"] for case in measured[name])
    assert first == second, "as hexadecimal text: bitwise"
    assert len(set(first)) == UPDATES
    assert first[0] == "None"


# Below runs on the ranks.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.enter = nn.Linear(8, 33)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.leave = nn.Linear(33, 8)
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.frozen(self.enter(x * self.scale)))) + self.shift.to(x.dtype)


def measure_everything() -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # this CPU computes fp16 slowly but rightly
    return {path.stem: _measure(path) for path in FILES}


def _measure(path: Path) -> dict[str, Any]:
    folder = Path(dist.broadcast_object(tempfile.mkdtemp()))
    engine = _engine(path, seed=0)
    ema = Ema(engine, CONFIG)
    case = _measure_average(engine, ema) | _measure_swap(engine, ema)
    _save(engine, ema, folder / "first")
    ends = _go_on(engine, ema)
    engine.close()

    resumed = _engine(path, seed=1)
    other = Ema(resumed, CONFIG)
    read_engine(folder / "first", resumed, other)
    _save(resumed, other, folder / "second")
    files = sorted(file.name for file in (folder / "first").iterdir())
    resumed_ends = _go_on(resumed, other)
    case |= {
        "files": files,
        "loaded_average_equal": all(
            (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes()
            for name in files
        ),
        "next_updates_equal": _equal(ends[0], resumed_ends[0]),
        "next_average_equal": _equal(ends[1], resumed_ends[1]),
        "clipping": _measure_clipping(resumed),
    }
    resumed.close()
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(folder)
    return case


def _measure_average(engine: Engine, ema: Ema) -> dict[str, Any]:
    clip, limits = AdaptiveClip(CLIP, fixed=None), []
    plain, equal = _masters(engine), []
    for update in range(UPDATES):
        limits.append(_hex(clip.limit()))
        engine.set_clip_norm(clip.limit())
        clip.observe(_update(engine, update, ema).gradient_norm)
        weight = 1.0 - ema_decay(CONFIG, samples_before=BATCH * update, samples_after=BATCH * (update + 1))
        plain = {name: torch.lerp(plain[name], value, weight) for name, value in _masters(engine).items()}
        equal.append(_equal(_average(engine, ema), plain))
    masters = _masters(engine)
    return {
        "average_is_plain": equal,
        "average_differs_from_masters": not any(torch.equal(plain[name], masters[name]) for name in plain),
        "elements": sum(shard.numel() for shard in engine.master_shards()),
        "total_elements": sum(value.numel() for value in masters.values()),
        "limits": limits,
    }


def _measure_swap(engine: Any, ema: Ema) -> dict[str, Any]:
    x = _data(99).to(engine.compute_dtype)
    states, weights, output = _states(engine), _weights(engine), _forward(engine, x)
    with ema.swapped():
        average = dist.broadcast_object(_masters(engine))
        inside, lent = _forward(engine, x), _weights(engine)
    plain = Net()
    plain.load_state_dict({**lent, **average, "shift": engine.module.shift})
    again, restored, forward = _states(engine), _weights(engine), _forward(engine, x)
    return {
        "weights_are_average": all(
            torch.equal(lent[name], value.to(engine.compute_dtype)) for name, value in average.items()
        ),
        "forward_is_plain": torch.equal(inside, _plain_forward(plain, x)),
        "forward_moved": (inside.float() - output.float()).abs().max().item(),
        "restored": {
            "states": _equal(states, again),
            "weights": _equal(weights, restored),
            "forward": torch.equal(output, forward),
        },
    }


def _measure_clipping(engine: Engine) -> list[list[float]]:
    norms, seen = [], []
    for update, clip_norm in enumerate(CLIP_NORMS):
        engine.scale_moments(0.0)
        engine.set_clip_norm(clip_norm)
        norms.append(float(_update(engine, update).gradient_norm))
        moments = [state.optimizer["exp_avg"].flatten() for state in engine.parameter_states()]
        seen.append(torch.cat(moments).norm().item() / 0.1)
    return [norms, seen]


def _engine(path: Path, *, seed: int) -> Any:
    from aiprod_ds.engine.deepspeed_engine import DeepSpeedEngine

    torch.manual_seed(seed)
    net = Net()
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    groups = [
        ParameterGroup(names=tuple(name for name in names if ("bias" in name) == odd), is_decayed=odd)
        for odd in (True, False)
    ]
    return DeepSpeedEngine(
        net,
        groups,
        optimizer=OptimizerConfig(betas=(0.9, 0.95), gradient_clip_norm=None),
        settings=_settings(path),
        micro_batch_size=BATCH // dist.world_size(),
        accumulation=1,
    )


def _settings(path: Path) -> DeepSpeedSettings:
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"] |= {"stage3_param_persistence_threshold": 40, "sub_group_size": 100}
    if "fp16" in values:
        values["fp16"] |= {"initial_scale_power": 8}
    return parse_deepspeed_settings(values, path.name)


def _update(engine: Engine, update: int, ema: Ema | None = None) -> UpdateResult:
    x = _data(update).chunk(dist.world_size())[dist.rank()]
    engine.set_learning_rate(0.05)
    engine.backward((engine(x.to(engine.compute_dtype)).float() - 3.0 * x).pow(2).mean())
    result = engine.step()
    assert result is not None
    assert result.applied
    if ema is not None:
        ema.update(samples_before=BATCH * update, samples_after=BATCH * (update + 1))
    return result


def _go_on(engine: Engine, ema: Ema) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for update in range(UPDATES, UPDATES + 2):
        _update(engine, update, ema)
    return _states(engine), _average(engine, ema)


def _save(engine: Engine, ema: Ema, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_engine(folder, engine, ema)


def _data(update: int) -> Tensor:
    return torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(update))


def _forward(engine: Engine, x: Tensor) -> Tensor:
    engine.eval()
    with torch.no_grad():
        output: Tensor = engine(x)
    engine.train()
    return output


def _plain_forward(plain: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = plain.to(x.dtype)(x)
    return output


def _average(engine: Engine, ema: Ema) -> dict[str, Tensor]:
    with ema.swapped():
        return _masters(engine)


def _masters(engine: Engine) -> dict[str, Tensor]:
    """Empty tensors on rank 1: comparisons of what is gathered count on rank 0."""
    return {state.name: state.value for state in engine.parameter_states()}


def _states(engine: Engine) -> dict[str, Tensor]:
    states = list(engine.parameter_states())
    moments = {f"{state.name}/{key}": value for state in states for key, value in state.optimizer.items()}
    return moments | {state.name: state.value for state in states}


def _weights(engine: Any) -> dict[str, Tensor]:
    """What this rank computes with."""
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    is_partitioned = hasattr(engine.module.enter.weight, "ds_id")
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=is_partitioned):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _hex(limit: float | None) -> str:
    return "None" if limit is None else limit.hex()
