"""The local engine against AdamW written out by hand, and its contract: accumulation, skipping, saving,
groups."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aiprod_ds.config.deepspeed import DeepSpeedSettings, parse_deepspeed_settings
from aiprod_ds.config.optim import OptimizerConfig
from aiprod_ds.engine.adamw import scale_moments
from aiprod_ds.engine.local_engine import LocalEngine
from aiprod_ds.engine.protocol import ParameterGroup, UpdateResult
from aiprod_ds.errors import CheckpointError, EngineError
from aiprod_ds.train.resume.engine_files import read_engine, write_engine

OPTIMIZER = OptimizerConfig(betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, gradient_clip_norm=0.5)
PRECISIONS = ("fp32", "bf16", "fp16")


def _settings(precision: str) -> DeepSpeedSettings:
    values: dict[str, object] = {"zero_optimization": {"stage": 1}}
    if precision != "fp32":
        values[precision] = {"enabled": True}
    if precision == "fp16":
        values["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}
    return parse_deepspeed_settings(values, "test")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4)
        self.tied = self.second
        self.offset: Tensor
        self.register_buffer("offset", torch.randn(4))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.first(self.frozen(x)))) + self.offset.to(x.dtype)


def _engine(
    precision: str = "fp32", seed: int = 0, accumulation: int = 1, module: nn.Module | None = None
) -> LocalEngine:
    torch.manual_seed(seed)
    net = Net() if module is None else module
    return LocalEngine(
        net, _groups(), optimizer=OPTIMIZER, settings=_settings(precision), micro_batch_size=8, accumulation=accumulation  # noqa: E501
    )  # fmt: skip


def _groups() -> list[ParameterGroup]:
    return [
        ParameterGroup(names=("first.weight", "second.weight"), is_decayed=True),
        ParameterGroup(names=("first.bias", "second.bias"), is_decayed=False),
    ]


def _data(update: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(update))


def _update(engine: LocalEngine, update: int, micro_batches: int = 1, factor: float = 1.0) -> UpdateResult:
    engine.set_learning_rate(0.1 / (1 + update))
    for x in _data(update).chunk(micro_batches):
        engine.backward((engine(x.to(engine.compute_dtype)).float() - x).pow(2).mean() * factor)
        result = engine.step()
    assert result is not None
    return result


def _values(engine: LocalEngine) -> dict[str, Tensor]:
    return {state.name: state.value for state in engine.parameter_states()}


def test_fp32_is_adamw_with_global_clipping_written_out() -> None:
    engine = _engine()
    torch.manual_seed(0)
    net = Net().double()
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    for update in range(5):
        result = _update(engine, update)
        x = _data(update).double()
        (net(x) - x).pow(2).mean().backward()
        norm = torch.stack([p.grad.norm() for p in weights.values() if p.grad is not None]).norm()
        assert float(result.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
        with torch.no_grad():
            for name, p in weights.items():
                assert p.grad is not None
                g = p.grad * min(1.0, 0.5 / (float(norm) + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g**2
                lr, decay = 0.1 / (1 + update), 0.1 if "weight" in name else 0.0
                corrected = (second[name] / (1 - 0.95 ** (update + 1))).sqrt() + 1e-8
                p.sub_(lr * decay * p + lr * first[name] / (1 - 0.9 ** (update + 1)) / corrected)
                p.grad = None
    for name, value in _values(engine).items():
        # fp32 against fp64: 5 updates, each with a relative rounding of 1e-7 that a small second moment
        # enlarges.
        torch.testing.assert_close(value.double(), weights[name].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2), ("fp16", 2e-3)])
def test_accumulation_equals_one_large_micro_batch(precision: str, tolerance: float) -> None:
    # The same mean of gradients, summed in another order; in 16 bit each partial gradient is rounded to 8
    # resp. 11 bits.
    whole, parts = _engine(precision), _engine(precision)
    for update in range(3):
        parts.set_batch(micro_batch_size=2, accumulation=4)
        a, b = _update(whole, update), _update(parts, update, micro_batches=4)
        assert float(a.gradient_norm) == pytest.approx(float(b.gradient_norm), rel=10 * tolerance)
    difference = torch.cat(
        [(_values(whole)[name] - value).flatten() for name, value in _values(parts).items()]
    )
    assert difference.norm() < tolerance * 5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_are_fp32_and_the_module_is_16_bit(precision: str) -> None:
    engine = _engine(precision)
    _update(engine, 0)
    masters, module = _values(engine), dict(engine.module.named_parameters())
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert all(parameter.dtype == engine.compute_dtype for parameter in module.values())
    assert all(torch.equal(masters[name].to(engine.compute_dtype), module[name]) for name in masters)
    assert any(not torch.equal(masters[name], module[name].float()) for name in masters), (
        "otherwise the masters add nothing"
    )
    assert engine.module.get_buffer("offset").dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_non_finite_gradient_changes_nothing(precision: str) -> None:
    engine = _engine(precision)
    _update(engine, 0)
    before = copy.deepcopy(list(engine.parameter_states()))
    result = _update(engine, 1, factor=float("nan"))
    assert not result.applied
    for a, b in zip(before, engine.parameter_states(), strict=True):
        assert torch.equal(a.value, b.value)
        assert (a.step, b.step) == (1, 1)
        assert all(torch.equal(a.optimizer[key], b.optimizer[key]) for key in a.optimizer)
    assert _update(engine, 2).applied


def test_fp16_reports_the_scale_that_the_update_used() -> None:
    engine = _engine("fp16")
    scales = [
        _update(engine, 0, factor=float("inf") if update == 0 else 1.0).loss_scale for update in range(5)
    ]
    assert scales == [16.0, 8.0, 8.0, 8.0, 16.0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_bitwise_and_restores_frozen_weights_and_buffers(precision: str, tmp_path: Path) -> None:
    engine = _engine(precision)
    for update in range(3):
        _update(engine, update)
    write_engine(tmp_path, engine)
    resumed = _engine(precision, seed=1)
    read_engine(tmp_path, resumed)
    for update in range(3, 6):
        a, b = _update(engine, update), _update(resumed, update)
        assert float(a.gradient_norm) == float(b.gradient_norm)
        assert a.loss_scale == b.loss_scale
    first, second = engine.module_state(), resumed.module_state()
    assert first.keys() == second.keys() == engine.module.state_dict().keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_state_of_another_precision_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path, _engine("fp32"))
    with pytest.raises(CheckpointError, match="must be of the same precision, got fp32 there, bf16 here"):
        read_engine(tmp_path, _engine("bf16"))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"engine\.json: missing"):
        read_engine(tmp_path, _engine())


def test_before_the_first_update_there_is_no_optimizer_state() -> None:
    states = list(_engine().parameter_states())
    assert [state.name for state in states] == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert all(state.optimizer == {} and state.step == 0 for state in states)


def test_step_returns_none_inside_a_window_and_the_batch_cannot_change_there() -> None:
    engine = _engine(accumulation=2)
    engine.backward(engine(_data(0)).pow(2).mean())
    assert engine.step() is None
    with pytest.raises(EngineError, match="between updates, got 1 of 2 micro-batches done"):
        engine.set_batch(micro_batch_size=4, accumulation=1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_new_weight_decay_holds_for_the_decayed_groups_alone(precision: str) -> None:
    """Without gradients AdamW only decays: w *= 1 - lr * decay."""
    engine = _engine(precision)
    engine.set_weight_decay(0.5)
    before = _values(engine)
    engine.set_learning_rate(0.1)
    engine.backward(engine(_data(0).to(engine.compute_dtype)).float().sum() * 0.0)
    engine.step()
    for name, value in _values(engine).items():
        # One multiplication in fp32.
        torch.testing.assert_close(
            value, before[name] * (0.95 if "weight" in name else 1.0), rtol=1e-6, atol=0.0
        )


def test_restoring_leaves_weight_decay_as_it_is(tmp_path: Path) -> None:
    saved = _engine()
    saved.set_weight_decay(0.7)
    _update(saved, 0)
    write_engine(tmp_path, saved)
    loaded = _engine(seed=1)
    loaded.set_weight_decay(0.3)
    read_engine(tmp_path, loaded)
    saved.set_weight_decay(0.3)
    _update(saved, 1)
    _update(loaded, 1)
    assert all(torch.equal(value, _values(saved)[name]) for name, value in _values(loaded).items())


def test_what_is_saved_does_not_depend_on_the_decay(tmp_path: Path) -> None:
    engine = _engine()
    texts = []
    for name, decay in (("first", 0.0), ("second", 0.9)):
        engine.set_weight_decay(decay)
        (tmp_path / name).mkdir()
        write_engine(tmp_path / name, engine)
        texts.append((tmp_path / name / "engine.json").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("factor", "step"), [(1.0, 3), (0.25, 3), (0.0, 0)])
def test_moments_are_scaled_and_a_reset_begins_the_count_anew(
    precision: str, factor: float, step: int
) -> None:
    engine = _engine(precision)
    for update in range(3):
        _update(engine, update)
    before = {state.name: state for state in engine.parameter_states()}
    engine.scale_moments(factor)
    for state in engine.parameter_states():
        assert state.step == step
        assert torch.equal(state.value, before[state.name].value)
        for name, moment in state.optimizer.items():
            assert torch.equal(moment, before[state.name].optimizer[name] * factor)  # a power of two: exact


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_reset_engine_goes_on_like_a_new_one(precision: str) -> None:
    reset, new = _engine(precision), _engine(precision)
    reset.backward(reset(_data(9).to(reset.compute_dtype)).float().pow(2).mean())
    assert reset.step() is not None  # at a learning rate of 0
    reset.scale_moments(0.0)
    for update in range(3):
        assert float(_update(reset, update).gradient_norm) == float(_update(new, update).gradient_norm)
    assert all(torch.equal(value, _values(new)[name]) for name, value in _values(reset).items())


def test_before_the_first_update_there_is_nothing_to_scale() -> None:
    engine = _engine()
    engine.scale_moments(0.0)
    assert all(state.optimizer == {} for state in engine.parameter_states())


def test_the_worked_example_of_scaling() -> None:
    state = {"exp_avg": torch.tensor(4.0), "exp_avg_sq": torch.tensor(16.0), "step": 7}
    scale_moments([state], 0.25)
    assert (float(state["exp_avg"]), float(state["exp_avg_sq"]), state["step"]) == (1.0, 4.0, 7)
    scale_moments([state], 0.0)
    assert (float(state["exp_avg"]), float(state["exp_avg_sq"]), state["step"]) == (0.0, 0.0, 0)


def test_a_reset_also_ends_what_is_not_finite() -> None:
    state = {
        "exp_avg": torch.tensor(float("nan")),
        "exp_avg_sq": torch.tensor(float("inf")),
        "step": torch.tensor(7.0),
    }
    scale_moments([state], 0.0)
    assert [float(value) for value in state.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan")])
def test_a_factor_out_of_range_is_refused(factor: float) -> None:
    with pytest.raises(EngineError, match=r"factor must lie in \[0, 1\], got"):
        _engine().scale_moments(factor)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "missing \\['first.bias'"),
        (
            [ParameterGroup(names=("first.weight", "frozen.weight"), is_decayed=False)],
            "must name trainable parameters",
        ),
        ([ParameterGroup(names=("nothing",), is_decayed=False)], "got \\['nothing'\\]"),
        (
            [*_groups(), ParameterGroup(names=("first.bias",), is_decayed=False)],
            "repeated \\['first.bias'\\]",
        ),
    ],
)
def test_groups_must_name_every_trainable_parameter_once(groups: list[ParameterGroup], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LocalEngine(
            Net(), groups, optimizer=OPTIMIZER, settings=_settings("fp32"), micro_batch_size=1, accumulation=1
        )


def test_after_close_the_module_can_have_a_new_engine() -> None:
    engine = _engine()
    _update(engine, 0)
    engine.close()
    engine.close()
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert _update(_engine(module=engine.module), 1).applied


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip_norm", [0.01, None, 1e-3])
def test_a_new_clip_norm_holds_from_the_next_update_on(precision: str, clip_norm: float | None) -> None:
    """A new optimizer's first moment is (1 - 0.9) times the gradient that it saw."""
    engine = _engine(precision)
    engine.set_clip_norm(clip_norm)
    norm = float(_update(engine, 0).gradient_norm)
    seen = (
        torch.cat([state.optimizer["exp_avg"].flatten() for state in engine.parameter_states()]).norm().item()
        / 0.1
    )
    assert norm > 0.02, "the norm that is reported is the one before clipping"
    # fp32 sums, and the 1e-6 that is added to the norm.
    assert seen == pytest.approx(norm if clip_norm is None else clip_norm, rel=2e-4)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_is_none_is_refused(clip_norm: float) -> None:
    with pytest.raises(EngineError, match="set_clip_norm: must be positive and finite, got"):
        _engine().set_clip_norm(clip_norm)


def test_restoring_leaves_the_clip_norm_as_it_is(tmp_path: Path) -> None:
    saved, loaded = _engine(), _engine(seed=1)
    write_engine(tmp_path, saved)
    loaded.set_clip_norm(1e-3)
    read_engine(tmp_path, loaded)
    _update(loaded, 0)
    seen = (
        torch.cat([state.optimizer["exp_avg"].flatten() for state in loaded.parameter_states()]).norm().item()
        / 0.1
    )
    assert seen == pytest.approx(1e-3, rel=2e-3)  # the norm has 1e-6 added to it


@pytest.mark.parametrize("precision", PRECISIONS)
def test_master_shards_are_the_masters_themselves(precision: str) -> None:
    engine = _engine(precision)
    _update(engine, 0)
    shards = engine.master_shards()
    assert [shard.dtype for shard in shards] == [torch.float32] * 4
    with torch.no_grad():
        for number, shard in enumerate(shards):
            shard.fill_(number + 1.001)
    names = [name for group in _groups() for name in group.names]
    engine.refresh_weights()
    for number, name in enumerate(names):
        weight = engine.module.get_parameter(name)
        assert torch.equal(
            _values(engine)[name], torch.full_like(weight, number + 1.001, dtype=torch.float32)
        )
        assert torch.equal(weight, torch.full_like(weight, number + 1.001))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_written_values_are_read_back_and_leave_the_optimizer_alone(precision: str) -> None:
    engine = _engine(precision)
    _update(engine, 0)
    before = {state.name: state for state in engine.parameter_states()}
    values = {"first.weight": torch.full((6, 4), 1.001), "frozen.weight": torch.full((4, 4), 2.001)}
    engine.write_values(values.items())
    for name, value in values.items():
        assert torch.equal(engine.module.get_parameter(name), value.to(engine.compute_dtype))
    assert torch.equal(engine.read_value("first.weight"), values["first.weight"]), (
        "the master, whatever the precision"
    )
    assert torch.equal(
        engine.read_value("frozen.weight"), values["frozen.weight"].to(engine.compute_dtype).float()
    )
    for state in engine.parameter_states():
        expected = before[state.name]
        assert torch.equal(state.value, values.get(state.name, expected.value))
        assert state.step == 1
        assert all(torch.equal(state.optimizer[key], expected.optimizer[key]) for key in expected.optimizer)


@pytest.mark.parametrize("name", ["first.weight", "frozen.weight"])
def test_a_value_that_was_read_is_a_copy(name: str) -> None:
    engine = _engine()
    engine.read_value(name).zero_()
    assert engine.read_value(name).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nothing", torch.zeros(1), "write_values: must name a parameter of the module, got 'nothing'"),
        ("offset", torch.zeros(4), "got 'offset'"),
        ("first.bias", torch.zeros(1), r"write_values: first.bias must have the shape \[6\], got \[1\]"),
        ("frozen.weight", torch.zeros(16), r"shape \[4, 4\], got \[16\]"),
    ],
)
def test_values_must_fit_a_parameter(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        _engine().write_values([(name, value)])


def test_only_a_parameter_can_be_read() -> None:
    with pytest.raises(EngineError, match="read_value: must name a parameter of the module, got 'offset'"):
        _engine().read_value("offset")
