"""The average of the weights: its decay in closed form, its update against float64, exchange, files and
refusals."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import parse_deepspeed_settings
from aiprod_ds.config.optim import EmaConfig, OptimizerConfig
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup
from aiprod_ds.errors import CheckpointError, ConfigError, EngineError
from aiprod_ds.optim import ema as ema_module
from aiprod_ds.optim.ema import Ema, ema_decay
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

CONFIG = EmaConfig(half_life_samples=64, ramp=0.5)
PRECISIONS = ("fp32", "bf16", "fp16")


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def _engine(precision: str = "fp32", *, seed: int = 0, width: int = 6) -> LocalEngine:
    torch.manual_seed(seed)
    net = Net(width)
    groups = [ParameterGroup(names=tuple(name for name, _ in net.named_parameters()), is_decayed=False)]
    values = {} if precision == "fp32" else {precision: {"enabled": True}}
    settings = parse_deepspeed_settings({"zero_optimization": {"stage": 1}, **values}, "test")
    return LocalEngine(
        net, groups, optimizer=OptimizerConfig(), settings=settings, micro_batch_size=8, accumulation=1
    )


def _train(engine: LocalEngine, ema: Ema, first: int, last: int) -> None:
    for update in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(update))
        engine.set_learning_rate(0.1)
        engine.backward((engine(x.to(engine.compute_dtype)).float() - x).pow(2).mean())
        engine.step()
        ema.update(samples_before=8 * update, samples_after=8 * (update + 1))


def _values(engine: LocalEngine) -> dict[str, Tensor]:
    return {state.name: state.value for state in engine.parameter_states()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _average(engine: LocalEngine, ema: Ema) -> dict[str, Tensor]:
    with ema.swapped():
        return _values(engine)


def test_the_worked_numbers() -> None:
    assert ema_decay(EmaConfig(), samples_before=320, samples_after=352) == pytest.approx(0.266794, abs=5e-7)
    for before in (4_000_000, 10**9):
        assert ema_decay(EmaConfig(), samples_before=before, samples_after=before + 32) == pytest.approx(
            0.99988910, abs=5e-9
        )


def test_half_of_the_average_is_left_after_the_half_life() -> None:
    assert ema_decay(
        EmaConfig(half_life_samples=100, ramp=None), samples_before=7, samples_after=107
    ) == pytest.approx(0.5)


def test_the_first_update_of_a_run_forgets_the_initial_weights_and_without_a_ramp_does_not() -> None:
    assert ema_decay(CONFIG, samples_before=0, samples_after=8) == 0.0
    assert ema_decay(
        EmaConfig(half_life_samples=8, ramp=None), samples_before=0, samples_after=8
    ) == pytest.approx(0.5)


@pytest.mark.parametrize("ramp", [None, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("chunks", [(8, 9, 500), (8, 100, 128, 129, 500), tuple(range(8, 501, 4))])
def test_decay_does_not_depend_on_how_samples_are_cut_into_batches(
    ramp: float | None, chunks: tuple[int, ...]
) -> None:
    """The product of decays is that of one batch; 1e-12: some hundred float64 roundings."""
    config = EmaConfig(half_life_samples=64, ramp=ramp)
    product = 1.0
    for before, after in itertools.pairwise(chunks):
        product *= ema_decay(config, samples_before=before, samples_after=after)
    assert product == pytest.approx(ema_decay(config, samples_before=8, samples_after=500), rel=1e-12)


def test_decay_grows_up_to_the_end_of_the_ramp_and_then_stays() -> None:
    decays = [ema_decay(CONFIG, samples_before=n, samples_after=n + 8) for n in range(0, 400, 8)]
    end = 128 // 8
    assert all(a < b for a, b in itertools.pairwise(decays[: end + 1]))
    assert decays[end:] == pytest.approx([0.5 ** (8 / 64)] * len(decays[end:]), rel=1e-15)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_average_is_the_formula_over_the_masters(precision: str) -> None:
    """Oracle: the recursion in float64 from the masters after each update; fp32 rounds at 6e-8 in each of 6
    updates."""
    engine = _engine(precision)
    ema = Ema(engine, CONFIG)
    expected = {name: value.double() for name, value in _values(engine).items()}
    for update in range(6):
        _train(engine, ema, update, update + 1)
        weight = 1.0 - ema_decay(CONFIG, samples_before=8 * update, samples_after=8 * update + 8)
        for name, value in _values(engine).items():
            expected[name] += weight * (value.double() - expected[name])
    for name, value in _average(engine, ema).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, _values(engine)[name]), "otherwise the comparison shows nothing"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swapping_lends_the_average_to_forward_and_gives_everything_back_bitwise(precision: str) -> None:
    engine = _engine(precision)
    ema = Ema(engine, CONFIG)
    _train(engine, ema, 0, 3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(9)).to(engine.compute_dtype)
    before, weights, output = (
        _values(engine),
        {k: v.clone() for k, v in engine.module.state_dict().items()},
        engine(x),
    )
    with ema.swapped():
        average, inside = _values(engine), engine(x)
        assert _equal(engine.module_state(), average)
    plain = Net()
    plain.load_state_dict(average)
    assert torch.equal(inside, plain.to(engine.compute_dtype)(x)), "forward computes with the average"
    assert not torch.equal(inside, output)
    assert torch.equal(engine(x), output)
    assert _equal(_values(engine), before)
    assert _equal(dict(engine.module.state_dict()), weights)
    assert _equal(_average(engine, ema), average)


def test_large_flat_shards_are_exchanged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "_EXCHANGED_AT_ONCE", 5)
    engine = _engine()  # its biases are flat and not multiples of 5
    ema = Ema(engine, CONFIG)
    start = _values(engine)
    _train(engine, ema, 0, 1)
    end = _values(engine)
    with torch.no_grad():
        for master in engine.master_shards():
            master.zero_()
    assert _equal(_average(engine, ema), end)
    assert not _equal(start, end)


def test_after_an_error_inside_masters_and_average_are_back_in_their_places() -> None:
    engine = _engine("bf16")
    ema = Ema(engine, CONFIG)
    _train(engine, ema, 0, 3)
    before, average = _values(engine), _average(engine, ema)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        _ = 1 // 0
    assert _equal(_values(engine), before)
    assert _equal(_average(engine, ema), average)


@pytest.mark.parametrize("call", ["update", "capture", "restore", "swapped"])
def test_inside_swapped_nothing_else_is_allowed(call: str, tmp_path: Path) -> None:
    engine = _engine()
    ema = Ema(engine, CONFIG)
    write_engine(tmp_path, engine, ema)
    calls = {
        "update": lambda: ema.update(samples_before=0, samples_after=1),
        "capture": lambda: write_engine(tmp_path, engine, ema),
        "restore": lambda: read_engine(tmp_path, engine, ema),
        "swapped": lambda: ema.swapped().__enter__(),
    }
    with ema.swapped(), pytest.raises(EngineError, match=rf"ema\.{call}: must be called outside"):
        calls[call]()


def test_resume_is_bitwise(tmp_path: Path) -> None:
    engine = _engine("bf16")
    ema = Ema(engine, CONFIG)
    _train(engine, ema, 0, 3)
    write_engine(tmp_path, engine, ema)
    resumed = _engine("bf16", seed=1)
    other = Ema(resumed, CONFIG)
    read_engine(tmp_path, resumed, other)
    assert _equal(_average(resumed, other), _average(engine, ema))
    _train(engine, ema, 3, 6)
    _train(resumed, other, 3, 6)
    assert _equal(_average(resumed, other), _average(engine, ema))


def test_a_state_without_an_average_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path, _engine())
    engine = _engine()
    with pytest.raises(CheckpointError, match=r"must hold ema/.* got no such tensor"):
        read_engine(tmp_path, engine, Ema(engine, CONFIG))


@pytest.mark.parametrize(
    "values", [{"half_life_samples": 0}, {"ramp": 0.0}, {"ramp": float("nan")}, {"decay": 0.999}]
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EmaConfig.model_validate(values)
